"""Recipes: Maestro's ordered ranks on problems whose answer is known, SoRA's gates."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.maps import Chain
from lrc.program import Program
from lrc.spec.registry import RECIPES
from lrc.train.checkpoint import Checkpoints
from lrc.train.data import Examples
from lrc.train.loop import Loop
from lrc.train.optim import ProximalAdamW
from lrc.train.recipes import Context
from lrc.train.recipes.maestro import MaestroRecipe, OrderedRanks, norms, penalty
from lrc.train.recipes.sora import SoraRecipe, Sparsify, thresholds
from lrc.train.schedule import Schedule
from lrc.train.settings import Settings


class Linears(nn.Module):
    """One linear, or two behind each other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def factorized(*sizes: int, weight: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Program:
    """Return a program whose linears are balanced products of full rank, from the SVD, in training mode."""
    torch.manual_seed(0)
    model = Linears(*sizes).to(dtype)
    if weight is not None:
        model.layers[0].weight.data.copy_(weight)
    program = lrc.capture(model, {"x": torch.randn(4, sizes[0], dtype=dtype)})
    for fqn, site in list(program.sites.items()):
        U, S, Vh = torch.linalg.svd(site.map.dense().weight, full_matrices=False)
        program.replace(fqn, Chain(U * S.sqrt(), S.sqrt()[:, None] * Vh), "factorize")
    return program


def context(
    program: Program, optimizer: torch.optim.Optimizer | None = None, steps: int = 10, per_epoch: int = 1000
) -> Context:
    parameters = {n: p for n, p in program.graph_module.named_parameters() if p.requires_grad}
    made = optimizer or torch.optim.SGD(parameters.values(), lr=0.1)
    return Context(program, list(program.sites), parameters, (), made, steps, per_epoch)


def ordered(program: Program, options: MaestroRecipe | None = None, **about: Any) -> OrderedRanks:
    made = RECIPES.get("maestro")(context(program, **about), options or MaestroRecipe())
    assert isinstance(made, OrderedRanks)
    return made


def test_the_hierarchical_penalty_is_the_sum_of_suffix_norms_and_its_importance_never_rises() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 7, generator=generator), torch.randn(4, 5, generator=generator)
    brute = sum(A[i:].norm() + B[:, i:].norm() for i in range(5))
    assert float(penalty(A, B, "hierarchical")) == pytest.approx(float(brute), rel=1e-6)
    plain = sum(A[i].norm() + B[:, i].norm() for i in range(5))
    assert float(penalty(A, B, "plain")) == pytest.approx(float(plain), rel=1e-6)
    assert float(penalty(A[:1], B[:, :1], "hierarchical")) == pytest.approx(float(penalty(A[:1], B[:, :1], "plain")))
    a, b = norms(A, B, "hierarchical")
    importance = (a * b).tolist()
    assert importance == sorted(importance, reverse=True)


def test_a_prefix_is_the_truncated_svd_and_ranks_behind_it_get_no_gradient() -> None:
    program = factorized(7, 5)
    weight = program.map_of("layers.0").dense().weight
    recipe = ordered(program)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    program.graph_module.train()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    for width in (1, 3, 5):
        recipe.drawn = {"layers.0": width}
        best = (U[:, :width] * S[:width]) @ Vh[:width]
        assert torch.allclose(program(x=x)["output"], x @ best.T, atol=1e-5)
    recipe.drawn = {"layers.0": 3}
    program(x=x)["output"].square().sum().backward()
    made = program.maps["layers.0"]
    assert bool((made.A.grad[3:] == 0).all())
    assert bool((made.B.grad[:, 3:] == 0).all())
    assert bool((made.A.grad[:3] != 0).any())
    program.graph_module.eval()
    assert torch.allclose(program(x=x)["output"], x @ weight.T, atol=1e-5)


def test_a_sweep_visits_every_layer_and_rank_once_with_one_layer_below_full_rank() -> None:
    recipe = ordered(factorized(6, 5, 4))
    seen = []
    for done in range(9):
        recipe.before(done)
        ((fqn, width),) = recipe.drawn.items()
        seen.append((fqn, width))
    assert sorted(seen) == [("layers.0", j) for j in range(1, 6)] + [("layers.1", j) for j in range(1, 5)]
    recipe.before(9)
    assert recipe.sweep == 2


def run(program: Program, inputs: Tensor, targets: Tensor, options: MaestroRecipe, steps: int, lr: float) -> OrderedRanks:
    """Train on all rows at once with plain SGD, as the notebook of the method's authors does."""
    optimizer = torch.optim.SGD([p for p in program.graph_module.parameters() if p.requires_grad], lr=lr)
    recipe = ordered(program, options, optimizer=optimizer, steps=steps, per_epoch=50)
    program.graph_module.train()
    for done in range(steps):
        recipe.before(done)
        loss = nn.functional.mse_loss(program(x=inputs)["output"], targets)
        added = recipe.penalty()
        optimizer.zero_grad()
        (loss if added is None else loss + added).backward()
        optimizer.step()
        recipe.after(done)
    program.graph_module.eval()
    return recipe


@pytest.mark.slow
def test_trained_prefixes_are_the_truncated_svd_of_the_map_that_is_learned() -> None:
    """The first stored case of the authors' notebook: x = I_9, a random 6 x 9 map of rank 3, SGD with lr 0.5."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(6, 3, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(9, 3, generator=generator)).Q
    C = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ V.T
    program = factorized(9, 6)
    recipe = run(program, torch.eye(9), C.T.contiguous(), MaestroRecipe(group_lasso=0.0), 3000, 0.5)
    made = program.maps["layers.0"]
    errors = []
    for b in (1, 2, 3):
        best = (U[:, :b] * torch.tensor([3.0, 2.0, 1.0])[:b]) @ V[:, :b].T
        errors.append(float((made.B[:, :b] @ made.A[:b] - best).detach().norm() / best.norm()))
    assert max(errors) < 5e-2, errors
    assert recipe.finish() == ["layers.0: 6 of 6 components stay, as a dense weight"]


@pytest.mark.slow
def test_an_identity_on_data_of_rank_three_keeps_three_components() -> None:
    """The second one (PCA): with the lasso the importances beyond the data's rank vanish."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3, generator=generator)).Q
    x = torch.randn(200, 3, generator=generator) @ basis.T
    program = factorized(10, 10)
    options = MaestroRecipe(group_lasso=1e-3, threshold=1e-3)
    recipe = run(program, x, x, options, 3000, 0.5)
    assert len(recipe.active["layers.0"]) == 3
    before = program(x=x)["output"]
    (note,) = recipe.finish()
    assert note == "layers.0: 3 of 10 components stay"
    assert torch.allclose(program(x=x)["output"], before, atol=1e-6)
    assert program.map_of("layers.0").cost().parameters == 60
    assert (program(x=x)["output"] - x).norm() < 0.1 * x.norm()


def test_a_layer_that_keeps_too_many_components_becomes_dense_again() -> None:
    program = factorized(6, 5)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    before = program(x=x)["output"]
    (note,) = ordered(program).finish()
    assert note == "layers.0: 5 of 5 components stay, as a dense weight"
    assert torch.allclose(program(x=x)["output"], before, atol=1e-5)


def test_a_dropped_component_stays_dropped_whatever_the_optimizer_does() -> None:
    program = factorized(6, 5)
    recipe = ordered(program, MaestroRecipe(threshold=0.5), per_epoch=2)
    made = program.maps["layers.0"]
    with torch.no_grad():
        made.A[3:] *= 1e-3
    recipe.after(1)
    assert recipe.active["layers.0"].tolist() == [0, 1, 2]
    with torch.no_grad():
        made.A.add_(0.1)
    recipe.after(2)
    assert bool((made.A[3:] == 0).all())
    twin = ordered(factorized(6, 5))
    twin.load(recipe.state())
    assert twin.active["layers.0"].tolist() == [0, 1, 2]


def test_the_most_important_component_stays_where_none_is_important_enough() -> None:
    program = factorized(6, 5)
    recipe = ordered(program, MaestroRecipe(threshold=1e9, kind="plain"), per_epoch=1)
    with torch.no_grad():
        program.maps["layers.0"].A[2] *= 100
    recipe.after(0)
    assert recipe.active["layers.0"].tolist() == [2]


def test_values_that_a_validation_brings_back_keep_the_components_that_they_had() -> None:
    """The best state may be one from before the last components were dropped; they are part of what was judged."""
    program = factorized(20, 20)
    recipe = ordered(program, MaestroRecipe(threshold=0.5), per_epoch=1)
    made = program.maps["layers.0"]
    with torch.no_grad():
        made.A[6:] *= 1e-4
    recipe.after(0)
    best = {name: p.detach().clone() for name, p in made.named_parameters()}
    with torch.no_grad():
        made.A[3:] *= 1e-4
    recipe.after(1)
    assert recipe.active["layers.0"].tolist() == [0, 1, 2]
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(best[name])
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(3))
    judged = program(x=x)["output"]
    assert recipe.finish() == ["layers.0: 6 of 20 components stay"]
    assert torch.allclose(program(x=x)["output"], judged, atol=1e-6)


def test_every_layer_draws_a_rank_of_its_own_after_the_epochs_at_full_rank() -> None:
    recipe = ordered(factorized(6, 5, 4), MaestroRecipe(sampler="independent", warmup_epochs=2), per_epoch=3)
    drawn = []
    for done in range(66):
        recipe.before(done)
        drawn.append(dict(recipe.drawn))
    assert drawn[:6] == [{}] * 6
    for fqn, full in (("layers.0", 5), ("layers.1", 4)):
        assert {row[fqn] for row in drawn[6:]} == set(range(1, full + 1))
    assert len({row["layers.0"] - row["layers.1"] for row in drawn[6:]}) > 3
    again = ordered(factorized(6, 5, 4), MaestroRecipe(sampler="independent", warmup_epochs=2), per_epoch=3)
    again.before(40)
    assert again.drawn == drawn[40]


@pytest.mark.parametrize("bias", [True, False])
def test_no_component_at_all_gives_the_bias(bias: bool) -> None:
    b = torch.arange(4.0) if bias else None
    made = Chain(torch.zeros(4, 0), torch.zeros(0, 6), bias=b)
    found = made(torch.randn(2, 3, 6))
    assert torch.equal(found, (torch.zeros(4) if b is None else b).expand(2, 3, 4))


def test_the_recipe_runs_in_the_spec_and_resumes(tmp_path: Path) -> None:
    from tiny import captured_mlp

    squeeze = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.4}, "form": "two_factor"}
    train = {
        "type": "train", "data": "tiny:calibration_of_mlp", "objective": "distillation", "steps": 12, "batch_size": 32,
        "optimizer": {"type": "adamw", "lr": 1e-2}, "recipe": {"type": "maestro", "threshold": 0.8, "group_lasso": 1e-3},
        "checkpoint_every": 5,
    }  # fmt: skip
    runs = [
        lrc.compile(captured_mlp(), {"version": 1, "passes": [squeeze, train]}, cache=tmp_path / name, allow_code=True)
        for name in ("a", "b")
    ]
    for path in (tmp_path / "b").rglob("step-00000012.pt"):
        path.unlink()
    runs.append(lrc.compile(captured_mlp(), {"version": 1, "passes": [squeeze, train]}, cache=tmp_path / "b", allow_code=True))
    tensors = [made.program.tensors() for made in runs]
    assert all(torch.equal(tensors[0][n], other[n]) for other in tensors[1:] for n in tensors[0])
    assert any("components stay" in note for note in runs[0].plan.notes)


def test_thresholds_rise_in_stages_at_the_end_of_the_run() -> None:
    options = SoraRecipe(to=7e-4, values=3, each=10)
    recipe = Sparsify([torch.ones(2)], [{"threshold": 1e-4}], options, 50)
    assert [recipe.at(i) for i in (0, 29, 30, 39, 40, 49)] == pytest.approx([1e-4, 1e-4, 4e-4, 4e-4, 7e-4, 7e-4])
    recipe.before(39)
    assert not recipe.comparable()
    recipe.before(40)
    assert recipe.comparable()
    assert Sparsify([torch.ones(2)], [{"threshold": 1e-4}], SoraRecipe(), 50).comparable()
    geometric = thresholds(1e-4, SoraRecipe(to=1e-2, values=3, spacing="exp_linear"))
    assert geometric == pytest.approx([1e-4, 1e-3, 1e-2])
    logs = thresholds(0.0, SoraRecipe(to=1.0, values=3, spacing="log_linear"))
    assert logs == pytest.approx([0.0, 0.6201145, 1.0])
    assert float(Sparsify([torch.tensor([3.0, -1.0])], [{"threshold": 0.0}], SoraRecipe(l1=2.0), 5).penalty() or 0) == 4.0


def test_gates_that_the_data_does_not_need_are_closed_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    B, A, gate = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.ones(6))
    x = torch.randn(64, 8)
    target = x @ (B[:, :2] @ A[:2]).detach().T
    module = nn.Module()
    module.B, module.A, module.gate = B, A, gate
    parameters = {"B": B, "A": A, "gate": gate}
    optimizer = ProximalAdamW([{"params": [A, B]}, {"params": [gate], "threshold": 3e-3}], lr=1e-2)
    about = Context(None, (), parameters, ["gate"], optimizer, 400, 1)  # type: ignore[arg-type]  # gates need no program
    recipe = RECIPES.get("sora")(about, SoraRecipe(l1=0.0, to=6e-3, values=3, each=50))
    examples = Examples(tuple({"x": a, "y": b} for a, b in zip(x, target, strict=True)), {}, True)
    loop = Loop(
        module, parameters, {}, examples, lambda batch, g: nn.functional.mse_loss((batch["x"] @ A.T * gate) @ B.T, batch["y"]),
        optimizer, Settings(400, batch_size=64, schedule=Schedule(type="constant")), Checkpoints(tmp_path), recipe=recipe,
    )  # fmt: skip
    loop.run()
    closed = int((gate == 0).sum())
    assert 1 <= closed <= 4
    assert recipe.finish() == [f"{closed} of 6 gates are closed"]


def test_recipes_refuse_what_they_cannot_work_on() -> None:
    program = lrc.capture(Linears(4, 3), {"x": torch.randn(2, 4)})
    with pytest.raises(UsageError, match="linears in two factors that are both trained"):
        RECIPES.get("maestro")(context(program), MaestroRecipe())
    with pytest.raises(UsageError, match="gates among what is trained"):
        RECIPES.get("sora")(context(program), SoraRecipe())
    gate = nn.Parameter(torch.ones(3))
    about = Context(program, (), {"g": gate}, ["g"], torch.optim.SGD([gate], lr=0.1), 10, 1)
    with pytest.raises(UsageError, match="optimizer proximal_adamw or proximal_sgd"):
        RECIPES.get("sora")(about, SoraRecipe())
    about = Context(program, (), {"g": gate}, ["g"], ProximalAdamW([gate], threshold=0.1), 10, 1)
    with pytest.raises(UsageError, match="more than 600 steps"):
        RECIPES.get("sora")(about, SoraRecipe(to=0.1))
