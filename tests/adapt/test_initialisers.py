"""What every initialiser promises, against torch.linalg and the formulas of the papers."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import lrc
from lrc.errors import LrcError
from lrc.initialisers import BUILTIN, Initial, LoraGa, Start
from lrc.measure.gradients import in_memory, mean_gradients
from lrc.solvers import Moments
from lrc.spec.registry import INITIALISERS

SHAPES = [(12, 8), (8, 12)]
RANK, SCALING = 2, 2.0
KEEPS = {"kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "lora_ga_hf"}


def weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(name: str, shape: tuple[int, int], *, rank: int = RANK, scaling: float = SCALING, gradient: Tensor | None = None,
        dtype: torch.dtype = torch.float64, **options: Any) -> Initial:  # fmt: skip
    """Run an initialiser alone, on random inputs where it observes any."""
    rule = INITIALISERS.get(name)
    made: Any = rule.options.model_validate({"type": name, **options})
    observer = made.observer(shape[1], rank)
    if observer is not None:
        for seed in range(8):
            observer.see(torch.randn(64, shape[1], generator=torch.Generator().manual_seed(seed)))
    start = Start(
        lambda: weight(shape).to(dtype), shape, rank, scaling, "linear", torch.Generator().manual_seed(3), Moments(),
        weight(shape, 5).float() if gradient is None else gradient, None if observer is None else observer.found(),
    )  # fmt: skip
    found = rule(start, made)
    assert isinstance(found, Initial)
    return found


def total(found: Initial, shape: tuple[int, int]) -> Tensor:
    """The weight that the sum stands for."""
    core = found.B.double() if found.core is None else found.B.double() @ found.core.double()
    base = weight(shape) if found.base is None else found.base.double()
    return base + SCALING * core @ found.A.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(KEEPS))
def test_the_sum_starts_as_the_weight(name: str, shape: tuple[int, int]) -> None:
    found = run(name, shape)
    assert found.A.shape == (RANK, shape[1])
    assert found.B.shape == (shape[0], RANK)
    assert torch.allclose(total(found, shape), weight(shape), atol=1e-5)


def test_there_is_a_test_of_the_start_for_every_initialiser() -> None:
    others = {"random", "loftq", "lora_sb", "svd_weight"}
    assert {rule.name for rule in BUILTIN} <= KEEPS | others


@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (9, 1)])
def test_pissa_takes_the_leading_triples_and_leaves_the_others(shape: tuple[int, int]) -> None:
    rank = min(RANK, *shape)
    found = run("pissa", shape, rank=rank)
    U, S, Vh = torch.linalg.svd(weight(shape), full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert torch.allclose(SCALING * found.B @ found.A, best)
    assert found.base is not None
    rest = torch.linalg.svdvals(found.base)
    assert torch.allclose(rest[: len(S) - rank], S[rank:], atol=1e-12)
    assert torch.allclose(found.B.norm(dim=0), found.A.norm(dim=1))


def test_a_randomised_pissa_is_close_to_the_exact_one_and_the_same_every_time() -> None:
    a, b = run("pissa", (12, 8), niter=16), run("pissa", (12, 8), niter=16)
    best = float(torch.linalg.svdvals(weight((12, 8)))[RANK:].norm())
    assert float((weight((12, 8)) - SCALING * a.B @ a.A).norm()) <= 1.001 * best
    assert torch.equal(a.A, b.A)


def test_corda_with_white_inputs_is_pissa() -> None:
    rule = INITIALISERS.get("corda")
    shape = (12, 8)
    start = Start(
        lambda: weight(shape).float(), shape, RANK, SCALING, "linear", torch.Generator(), observed=torch.eye(8)
    )  # fmt: skip
    found, pissa = rule(start, rule.options()), run("pissa", shape, dtype=torch.float32)
    assert torch.allclose(found.B @ found.A, pissa.B @ pissa.A, atol=1e-4)


def test_orthogonal_factors_are_not_zero_and_an_odd_rank_is_refused() -> None:
    found = run("orthogonal", (12, 8), rank=4)
    assert float(found.A.abs().min(1).values.max()) > 0
    assert float(found.B.abs().max()) > 0
    assert "even rank" in str(INITIALISERS.get("orthogonal").options().obstacle("linear", (12, 8), 3))


def test_loftq_comes_closer_to_the_weight_than_rounding_does() -> None:
    shape = (16, 24)
    for iterations in (1, 5):
        found = run("loftq", shape, scaling=1.0, dtype=torch.float32, iterations=iterations)
        assert found.base is not None
        error = (found.base.double() + found.B.double() @ found.A.double() - weight(shape)).norm()
        assert float(error) < float((found.base.double() - weight(shape)).norm())
        assert len(found.base.unique()) <= 16 * (shape[0] * shape[1] // 64)
    assert not found.subtracted


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_of_lora_ga_follows_the_best_approximation_of_the_gradient(
    shape: tuple[int, int], direction: str
) -> None:
    G = weight(shape, 5)
    found = run("lora_ga", shape, gradient=G.float(), scale="unit", direction=direction, niter=30)
    A, B = found.A.double(), found.B.double()
    assert torch.allclose(A @ A.T, torch.eye(RANK, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(B.T @ B, torch.eye(RANK, dtype=torch.float64), atol=1e-5)
    assert float((B.T @ G @ A.T).abs().max()) < 1e-4
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, : 2 * RANK] * S[: 2 * RANK] @ Vh[: 2 * RANK]
    assert torch.allclose(G @ A.T @ A + B @ B.T @ G, best, atol=1e-3)
    for step in (1e-3, 1e-4):
        gradient_of_A, gradient_of_B = SCALING * B.T @ G, SCALING * G @ A.T
        moved = SCALING * ((B - step * gradient_of_B) @ (A - step * gradient_of_A) - B @ A)
        assert float((moved + step * SCALING**2 * best).norm() / (step * SCALING**2 * best.norm())) < 100 * step


def test_the_scales_of_lora_ga() -> None:
    shape = (12, 8)
    stable = run("lora_ga", shape)
    size = shape[0] ** 0.25 / 16**0.5
    assert torch.allclose(stable.A.norm(dim=1), torch.full((RANK,), size), atol=1e-5)
    assert torch.allclose(stable.B.norm(dim=0), torch.full((RANK,), size), atol=1e-5)
    assert float((SCALING * stable.B @ stable.A).norm()) == pytest.approx(SCALING * RANK**0.5 * shape[0] ** 0.5 / 16, rel=1e-4)
    louder = run("lora_ga", shape, gradient=7 * weight(shape, 5).float())
    assert torch.allclose(louder.B @ louder.A, stable.B @ stable.A, atol=1e-5)
    clipped = run("lora_ga", shape, scale="gd", scaling=0.01, norm_clip=True)
    assert float((0.01 * clipped.B @ clipped.A).abs().max()) <= float(weight(shape).abs().max()) * (1 + 1e-5)
    assert "singular vectors" in str(LoraGa().obstacle("linear", (12, 8), 5))


def test_the_other_scales_of_lora_ga_are_the_authors() -> None:
    shape = (12, 8)
    W, G = weight(shape), weight(shape, 5)
    unit, gd, svd = (run("lora_ga", shape, scale=scale) for scale in ("unit", "gd", "weight_svd"))
    assert torch.allclose(gd.A, unit.A / SCALING)
    assert torch.allclose(gd.B, unit.B / SCALING)
    factor = float((torch.linalg.svdvals(W)[:RANK] / SCALING).sqrt().mean())
    assert torch.allclose(svd.B @ svd.A, factor**2 * unit.B @ unit.A, atol=1e-5)
    clipped = run("lora_ga", shape, scale="gd", scaling=0.01, norm_clip=True)
    offset = 0.01 * clipped.B @ clipped.A
    assert float(offset.abs().max()) == pytest.approx(float(W.abs().max()), rel=1e-5)  # it was larger
    assert clipped.base is not None
    assert torch.allclose(clipped.base + offset, W, atol=1e-5)
    drawn = run("lora_ga", shape, scale="unit", direction="random")
    assert float((drawn.B.double().T @ G @ drawn.A.double().T).abs().max()) < 1e-4  # from disjoint triples
    S = torch.linalg.svdvals(G)
    theirs = {scale: run("lora_ga_hf", shape, scale=scale) for scale in ("unit", "gd", "weight_svd")}
    assert torch.allclose(theirs["unit"].B.norm(dim=0).double(), S[RANK : 2 * RANK], rtol=1e-3)
    assert torch.allclose(theirs["gd"].B @ theirs["gd"].A, theirs["unit"].B @ theirs["unit"].A / SCALING**2, atol=1e-5)
    largest = torch.linalg.svdvals(W)[0] / S[RANK]
    assert torch.allclose(theirs["weight_svd"].B, (theirs["unit"].B * largest).float(), rtol=1e-3, atol=1e-4)


def test_the_variant_of_peft_carries_the_singular_values_of_the_gradient() -> None:
    shape = (12, 8)
    found = run("lora_ga_hf", shape)
    S = torch.linalg.svdvals(weight(shape, 5))
    assert torch.allclose(found.A.norm(dim=1), torch.ones(RANK), atol=1e-5)
    assert torch.allclose(found.B.norm(dim=0).double(), S[RANK : 2 * RANK] * shape[0] ** 0.25 / 4, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_sb_is_the_best_part_of_the_first_update(shape: tuple[int, int]) -> None:
    found = run("lora_sb", shape, step=0.01, niter=30)
    D = -0.01 * weight(shape, 5).sign()
    assert found.core is not None
    assert found.base is None
    error = (D - SCALING * found.B.double() @ found.core.double() @ found.A.double()).square().sum()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(D)[RANK:].square().sum()), rel=1e-4)
    eye = torch.eye(RANK)
    assert torch.allclose(found.B.T @ found.B, eye, atol=1e-5)
    assert torch.allclose(found.A @ found.A.T, eye, atol=1e-5)
    diagonal = found.core.diagonal()
    assert torch.equal(found.core, torch.diag(diagonal))
    assert bool((diagonal >= 0).all())
    assert bool((diagonal[:-1] >= diagonal[1:]).all())
    louder = run("lora_sb", shape, step=0.01, niter=30, gradient=9 * weight(shape, 5).float())
    assert torch.equal(louder.core, found.core)  # type: ignore[arg-type]


def test_gradients_of_weights_are_those_of_autograd() -> None:
    model = tiny.mlp()
    program = lrc.capture(model, {"x": tiny.mlp_inputs()})
    batches: Any = tiny.calibration_of_mlp()
    found = mean_gradients(program, batches, ["up", "middle", "down"], loss="outputs")
    expected = {name: torch.zeros_like(model.get_submodule(name).weight) for name in found}
    for place, batch in enumerate(batches):
        model.zero_grad()
        output = model(batch["x"])
        generator = torch.Generator().manual_seed(place)
        sent = torch.randn(output.shape, generator=generator) / len(output)
        output.backward(sent)
        for name in expected:
            expected[name] += model.get_submodule(name).weight.grad / len(batches)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5)


def test_gradients_are_measured_for_as_many_sites_as_memory_allows() -> None:
    program = lrc.capture(tiny.mlp(), {"x": tiny.mlp_inputs()})
    sites = ["up", "middle", "down"]
    assert list(in_memory(program, sites, 0)) == [["up"], ["middle"], ["down"]]
    assert list(in_memory(program, sites, 4 * (240 + 320))) == [["up", "middle"], ["down"]]
    assert list(in_memory(program, sites, 10**9)) == [sites]


def adapted(init: Any, **options: Any) -> Any:
    spec = {"version": 1, "passes": [{"type": "adapt", "rank": 3, "init": init, **options}]}
    return lrc.compile(tiny.mlp(), spec, inputs={"x": tiny.mlp_inputs()}, calibration=tiny.calibration_of_mlp())


@pytest.mark.parametrize("init", ["lora_ga", "lora_ga_hf", "eva", "corda", "orthogonal"])
def test_data_aware_starts_keep_the_output_of_a_model(init: str) -> None:
    rank: dict[str, Any] = {"rank": 4}
    made = adapted(init, **rank)
    x = tiny.mlp_inputs(seed=3)
    assert torch.allclose(made.module(x), tiny.mlp()(x), atol=1e-5)


def test_memory_for_gradients_changes_nothing_but_time() -> None:
    a, b = (adapted("lora_ga", gradient_mb=size) for size in (0, 64))
    for p, q in zip(a.program.tensors().values(), b.program.tensors().values(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_start_that_looks_at_data_asks_for_it() -> None:
    spec = {"version": 1, "passes": [{"type": "adapt", "rank": 3, "init": "eva"}]}
    with pytest.raises(LrcError, match="calibration"):
        lrc.compile(tiny.mlp(), spec, inputs={"x": tiny.mlp_inputs()})
