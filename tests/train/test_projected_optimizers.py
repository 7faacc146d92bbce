"""GaLore and Fira: against the packages of their authors, and by what must hold of any gradient."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.errors import UsageError
from lrc.spec.registry import OPTIMIZERS
from lrc.train.optim import Adam, Fira, GaLore, Trained
from lrc.train.optim.fira import FiraOptions
from lrc.train.optim.galore import GaLoreOptions
from lrc.train.optim.projection import basis, down, up

GAP = 4
STEPS = 10  # over two updates of the projection
SHAPES = [(12, 7), (7, 12), (9, 9)]


def gradients(shape: tuple[int, ...], steps: int = STEPS, seed: int = 0, scale: float = 1.0) -> Iterator[Tensor]:
    """Yield gradients that share a part, as those of a training run do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    for _ in range(steps):
        yield scale * (common + 0.3 * torch.randn(shape, generator=generator))


def parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)))


def follow(optimizer: torch.optim.Optimizer, p: Tensor, grads: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the parameter after every step."""
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        yield p.detach().clone()


def reference(package: str, name: str, p: Tensor, **options: Any) -> torch.optim.Optimizer:
    """Return the optimiser of the method's authors."""
    module = pytest.importorskip(package, reason=f"skipped: the comparison needs `pip install --no-deps {package}`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' optimiser, which both copied, warns that it is deprecated
        made: torch.optim.Optimizer = getattr(module, name)([{"params": [p], **options}], lr=0.02, weight_decay=0.1)
    return made


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `galore_torch.adamw` be imported without the rest of its package, which wants bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("skipped: the comparison needs `pip install --no-deps galore-torch`")
    package = ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "galore_torch", package)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_takes_the_steps_of_its_authors_package(shape: tuple[int, int], proj_type: str, no_bitsandbytes: None) -> None:
    ours, other = parameter(shape), parameter(shape)
    options = {"rank": 3, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    theirs = reference("galore_torch.adamw", "AdamW", other, **options)
    made = GaLore([ours], lr=0.02, weight_decay=0.1, **options)  # type: ignore[arg-type]
    for a, b in zip(follow(made, ours, gradients(shape)), follow(theirs, other, gradients(shape)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_fira_takes_the_steps_of_its_authors_package(shape: tuple[int, int], proj_type: str, alpha: float) -> None:
    ours, other = parameter(shape), parameter(shape)
    options = {"rank": 3, "update_proj_gap": GAP, "proj_type": proj_type}
    theirs = reference("fira.fira_adamw", "AdamW", other, alpha=alpha, **options)
    made = Fira([ours], lr=0.02, weight_decay=0.1, scale=alpha, **options)  # type: ignore[arg-type]
    for a, b in zip(follow(made, ours, gradients(shape)), follow(theirs, other, gradients(shape)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_complete_basis_leaves_no_residual_and_fira_equals_galore(shape: tuple[int, int]) -> None:
    G = next(gradients(shape))
    state: dict[str, Any] = dict(basis(G, min(shape), "left" if shape[0] < shape[1] else "right"))
    assert (up(down(G, state), state) - G).norm() <= 1e-5 * G.norm()
    a, b = parameter(shape), parameter(shape)
    options = {"rank": 100, "scale": 1.0, "update_proj_gap": 1, "lr": 1e-2}
    pairs = zip(
        follow(GaLore([a], **options), a, gradients(shape)),  # type: ignore[arg-type]
        follow(Fira([b], **options), b, gradients(shape)),  # type: ignore[arg-type]
        strict=True,
    )
    assert all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in pairs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_orthonormal_and_gives_the_best_approximation(shape: tuple[int, int], side: Any) -> None:
    G = next(gradients(shape))
    state: dict[str, Any] = dict(basis(G, 3, side))
    Q = state["P"].T if side == "left" else state["Q"]
    assert torch.allclose(Q @ Q.T, torch.eye(3), atol=1e-5)
    inside = up(down(G, state), state)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    assert (inside.double() - best).norm() <= 1e-5 * best.norm()
    E = G - inside
    assert (down(E, state)).norm() <= 1e-5 * G.norm()
    assert G.norm() ** 2 == pytest.approx(float(inside.norm() ** 2 + E.norm() ** 2), rel=1e-5)


def test_the_residual_never_grows_by_more_than_the_limit_and_falls_freely() -> None:
    p = parameter((10, 6))
    made = Fira([p], rank=2, update_proj_gap=GAP)
    before = None
    for i, grad in enumerate(gradients((10, 6), 30)):
        p.grad = grad * (10.0 if i % 7 == 3 else 1.0)
        made.step()
        norm = float(made.state[p]["residual_norm"])
        assert before is None or norm <= 1.01 * before * (1 + 1e-6)
        before = norm
    S, state = torch.ones(4, 3), {"residual_norm": torch.tensor(5.0)}
    assert torch.equal(made.limited(S.clone(), made.param_groups[0], state), S)
    assert float(state["residual_norm"]) == pytest.approx(12**0.5)


def test_fira_without_its_residual_is_galore_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fira, "limited", lambda self, S, group, state: torch.zeros_like(S))
    a, b = parameter((9, 6)), parameter((9, 6))
    pairs = zip(
        follow(GaLore([a], rank=2, update_proj_gap=GAP), a, gradients((9, 6))),
        follow(Fira([b], rank=2, update_proj_gap=GAP), b, gradients((9, 6))),
        strict=True,
    )
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("kind", "more"), [(GaLore, 0), (Fira, 1)])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_state_has_the_numbers_of_the_formula(kind: type[GaLore], more: int, shape: tuple[int, int]) -> None:
    p, rank = parameter(shape), 3
    made = kind([p], rank=rank)
    list(follow(made, p, gradients(shape, 2)))
    tensors = [t for t in made.state[p].values() if isinstance(t, Tensor)]
    short, long = min(shape), max(shape)
    assert sum(t.numel() for t in tensors) == short * rank + 2 * long * rank + more
    assert made.state[p]["exp_avg"].shape == ((rank, shape[1]) if shape[0] < shape[1] else (shape[0], rank))
    assert all(t.shape != shape for t in tensors)


def test_moments_of_8_bits_take_a_byte_a_number_and_stay_close() -> None:
    shape, rank = (64, 48), 8
    a, b = parameter(shape), parameter(shape)
    whole, coded = GaLore([a], rank=rank), GaLore([b], rank=rank, state_bits=8)
    exact = list(follow(whole, a, gradients(shape)))[-1]
    close = list(follow(coded, b, gradients(shape)))[-1]
    numbers = 64 * rank
    size = sum(t.numel() * t.element_size() for name, t in coded.state[b].items() if name not in ("step", "Q"))
    assert size == 2 * (numbers + 4 * -(-numbers // 256))
    moved = (exact - parameter(shape).detach()).norm()
    assert (exact - close).norm() <= 0.05 * moved


def test_the_basis_changes_at_multiples_of_the_gap_alone() -> None:
    p = parameter((8, 5))
    made = GaLore([p], rank=2, update_proj_gap=GAP)
    seen = []
    for _ in follow(made, p, gradients((8, 5), 9)):
        seen.append(made.state[p]["Q"].clone())
    changed = [i for i in range(1, 9) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [GAP, 2 * GAP]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_identically(bits: int, dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in gradients((9, 6), 12)]
    a = torch.nn.Parameter(parameter((9, 6)).detach().to(dtype))
    options = {"rank": 2, "update_proj_gap": GAP, "state_bits": bits}
    first = Fira([a], **options)  # type: ignore[arg-type]
    list(follow(first, a, iter(grads[:6])))
    b = torch.nn.Parameter(a.detach().clone())
    second = Fira([b], **options)  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    assert all(
        torch.equal(x, y) for x, y in zip(follow(first, a, iter(grads[6:])), follow(second, b, iter(grads[6:])), strict=True)
    )


def test_vectors_and_groups_without_a_rank_get_plain_adam() -> None:
    bias, table, plain = parameter((6,)), parameter((6, 5)), parameter((6, 5))
    made = GaLore([{"params": [bias], "rank": 2}, {"params": [table]}], lr=0.01)
    other = Adam([plain], lr=0.01)
    for grad in gradients((6, 5), 3):
        bias.grad, table.grad, plain.grad = grad[:, 0].clone(), grad.clone(), grad.clone()
        made.step()
        other.step()
    assert torch.equal(table, plain)
    assert made.state[bias]["exp_avg"].shape == (6,)


def test_a_kernel_is_projected_as_a_matrix_of_its_output_channels() -> None:
    kernel, matrix = parameter((8, 3, 2, 2)), torch.nn.Parameter(parameter((8, 3, 2, 2)).detach().flatten(1).clone())
    a, b = Fira([kernel], rank=2), Fira([matrix], rank=2)
    for grad in gradients((8, 12), 3):
        kernel.grad, matrix.grad = grad.view(8, 3, 2, 2).clone(), grad.clone()
        a.step()
        b.step()
    assert torch.equal(kernel.detach().flatten(1), matrix)


def test_the_first_step_is_sign_like() -> None:
    p = parameter((12, 7))
    before = p.detach().clone()
    made = GaLore([p], lr=0.01, rank=7, scale=1.0, eps=0.0)
    list(follow(made, p, gradients((12, 7), 1)))
    moved = (p.detach() - before) @ made.state[p]["Q"].T
    assert torch.allclose(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3)


@pytest.mark.parametrize("scaling", ["vector", "matrix"])
@pytest.mark.parametrize("residual", ["reference", "orthogonal"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_first_step_of_fira_is_its_formula(shape: tuple[int, int], residual: Any, scaling: Any) -> None:
    """There N = sign(R) up to a factor, so that what lies outside moves by lr sqrt(d) / |R|, d the entries of a vector."""
    lr, alpha, rank = 0.01, 0.25, 3
    p = parameter(shape)
    before = p.detach().clone()
    G = next(gradients(shape))
    made = Fira([p], lr=lr, rank=rank, scale=alpha, eps=0.0, residual=residual, scaling=scaling)
    list(follow(made, p, iter([G])))
    left = shape[0] < shape[1]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    P, Q = U[:, :rank], Vh[:rank]
    R = P.T @ G if left else G @ Q.T
    inside, step = (P @ R, P @ R.sign()) if left else (R @ Q, R.sign() @ Q)
    outside = G - (alpha if residual == "reference" else 1.0) * inside
    if scaling == "vector":
        factor = lr * rank**0.5 / (R.norm(dim=0) if left else R.norm(dim=1, keepdim=True))
    else:
        factor = lr * R.numel() ** 0.5 / R.norm()
    torch.testing.assert_close(before - p.detach(), lr * alpha * step + outside * factor, rtol=1e-3, atol=1e-6)
    if residual == "orthogonal":
        assert float((P.T @ outside if left else outside @ Q.T).norm()) <= 1e-5 * float(G.norm())


def test_defaults_are_those_of_the_published_code() -> None:
    for made in (FiraOptions(), GaLoreOptions()):
        given = (made.lr, made.betas, made.eps, made.weight_decay, made.rank, made.update_proj_gap, made.scale, made.proj_type)
        assert given == (0.01, (0.9, 0.999), 1e-6, 0.0, 128, 200, 0.25, "std")
    assert (FiraOptions().norm_growth_limit, FiraOptions().residual, FiraOptions().scaling) == (1.01, "reference", "vector")


def test_options_out_of_range_are_refused() -> None:
    p = parameter((4, 3))
    with pytest.raises(ValueError, match="rank is at least 1"):
        GaLore([p], rank=0)
    with pytest.raises(ValueError, match="proj_type is one of"):
        GaLore([p], rank=1, proj_type="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no vectors to scale by"):
        Fira([p], rank=1, proj_type="full")
    with pytest.raises(ValueError, match="state_bits is 8 or 32"):
        Fira([p], rank=1, state_bits=4)


def test_ignored_matrices_get_plain_adam_and_a_pattern_must_match() -> None:
    parameters = {name: nn.Parameter(torch.randn(6, 9)) for name in ("embed.weight", "block.weight")}
    parameters["block.bias"] = nn.Parameter(torch.randn(6))
    made = OPTIMIZERS.get("galore")(Trained(parameters), GaLoreOptions(rank=2, ignore=["embed.*"]))
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    made.step()
    assert made.state[parameters["embed.weight"]]["exp_avg"].shape == (6, 9)
    assert made.state[parameters["block.weight"]]["exp_avg"].shape == (2, 9)
    with pytest.raises(UsageError, match="`ignore: head` matches no trained parameter"):
        OPTIMIZERS.get("fira")(Trained(parameters), FiraOptions(rank=2, ignore=["head"]))
    alone = Trained({"block.weight": parameters["block.weight"]})  # as updates in the backward pass have it
    assert OPTIMIZERS.get("galore")(alone, GaLoreOptions(rank=2, ignore=["embed.*"])).param_groups[0]["rank"] == 2
