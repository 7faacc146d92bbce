"""LoRAPrune: the invariants of its numbers, and pruning inside training that ends in smaller modules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import group_of
from torch import Tensor, nn

import lrc
from lrc.errors import TrainError, UsageError
from lrc.program.dependency import find_groups
from lrc.solvers.lora_guided import guided_entries, guided_gradient, kept_units, pruned_share
from lrc.train.recipes.base import Context
from lrc.train.recipes.loraprune import LoraPruneRecipe, loraprune


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


class Mlps(nn.Module):
    """Residual blocks with a gated MLP each."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.up, self.gate, self.down = (
            nn.ModuleList(nn.Linear(*shape) for _ in range(blocks)) for shape in ((8, 12), (8, 12), (12, 8))
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            x = x + down(up(x) * torch.sigmoid(gate(x)))
        return self.head(x)


def mlps() -> Mlps:
    torch.manual_seed(0)
    return Mlps().eval()


def trained(
    recipe: dict[str, Any], *, steps: int = 20, adapt: Any = "{up,gate,down}.*", then: Any = (), **options: Any
) -> lrc.Compiled:
    x, noise = (torch.randn(32, n, generator=torch.Generator().manual_seed(n)) for n in (6, 4))
    model = mlps()
    with torch.no_grad():
        np.savez("t.npz", x=x.numpy(), labels=(model(x) + 0.1 * noise).numpy())
    passes = [
        {"type": "adapt", "targets": [adapt], "method": "lora", "rank": 3, "alpha": 6},
        {
            "type": "train",
            "data": "t.npz",
            "objective": "regression",
            "steps": steps,
            "batch_size": 8,
            "recipe": recipe,
            **options,
        },
        *then,
    ]
    return lrc.compile(model, {"version": 1, "passes": passes}, inputs=[x[:4]], calibration=[(x,)], cache=Path("cache"))


def test_the_gradient_estimate_is_the_change_of_the_product() -> None:
    g = torch.Generator().manual_seed(0)
    A, gA = (torch.randn(3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    B, gB = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(guided_gradient(A, B, gA, gB), B @ A - (B - gB) @ (A - gA), rtol=0, atol=1e-6)


def test_with_a_whole_basis_the_estimate_is_the_gradient() -> None:
    """A orthonormal, B zero: dL/dB = G Aᵀ, so gB A = G."""
    A = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    G = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(guided_gradient(A, torch.zeros(4, 6).double(), torch.zeros(6, 6).double(), G @ A.T), G)


def test_scores_are_zero_for_zero_weights_and_follow_no_order_of_inputs() -> None:
    W, G = torch.randn(4, 6), torch.randn(4, 6)
    W[2] = 0
    sums = guided_entries(W, G, 2).sum(1)
    assert sums[2] == 0
    order = torch.randperm(6)
    torch.testing.assert_close(guided_entries(W[:, order], G[:, order], 2).sum(1), sums)


def test_the_schedule_rises_as_a_cubic_from_the_first_share_to_the_last() -> None:
    shares = [pruned_share(t, 100, initial=0.1, final=0.5, warmup=0.1, cooldown=0.1) for t in range(101)]
    assert shares[0] == shares[10] == 0.1
    assert shares[90] == shares[100] == 0.5
    assert shares == sorted(shares)
    middle = pruned_share(50, 100, initial=0.0, final=0.5, warmup=0.1, cooldown=0.1)
    assert middle == pytest.approx(0.875 * 0.5)


def test_what_is_out_stays_out() -> None:
    mask = kept_units(torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.ones(4, dtype=torch.bool), 1)
    assert mask.tolist() == [True, False, True, True]
    mask = kept_units(torch.tensor([0.3, 9.0, 0.2, 0.4]), mask, 2)
    assert mask.tolist() == [True, False, False, True]


def test_training_ends_in_narrower_modules_that_merge() -> None:
    recipe = {"type": "loraprune", "width_kept": 0.5, "every": 2, "skip_first": 0.0, "skip_last": 1}
    done = trained(recipe, then=[{"type": "merge"}])
    widths = [done.program.sites[f"up.{i}"].out_features for i in range(3)]
    assert widths == [6, 6, 12]
    assert [done.program.sites[f"gate.{i}"].out_features for i in range(3)] == widths
    assert done.program.sites["down.0"].map.in_features == 6
    assert any("up.0: 6 of 12 features stay" in note for note in done.plan.notes)
    assert repr(done.program.sites["up.0"].map).startswith("Dense[6,8]")
    x = torch.randn(5, 6)
    torch.testing.assert_close(done.module(x), done.graft()(x), rtol=0, atol=1e-6)


def test_the_cut_module_is_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop judged last, with masks, is what stands there afterwards."""
    from lrc.train.recipes.loraprune import GuidedPruning

    x = torch.randn(5, 6)
    seen = {}
    finish = GuidedPruning.finish

    def kept(self: GuidedPruning) -> list[str]:
        with torch.no_grad():
            seen["masked"] = self.program(x)["output"]
        assert sorted(int(mask.sum()) for mask in self.masks.values()) == [6, 6]
        return finish(self)

    monkeypatch.setattr(GuidedPruning, "finish", kept)
    done = trained({"type": "loraprune", "width_kept": 0.5, "every": 3, "skip_first": 0.0})
    with torch.no_grad():
        torch.testing.assert_close(done.program(x)["output"], seen["masked"], rtol=0, atol=1e-6)
    groups = find_groups(done.program)
    assert group_of(groups, "up.0").units == 6


def test_a_validation_prefers_no_state_that_is_not_pruned_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole modules do better than narrow ones, and are not what the run ends with."""
    from lrc.train.recipes.loraprune import GuidedPruning

    seen: list[GuidedPruning] = []
    show = GuidedPruning.show
    monkeypatch.setattr(GuidedPruning, "show", lambda self: (seen.append(self), show(self))[1])
    recipe = {"type": "loraprune", "width_kept": 0.5, "every": 2, "skip_first": 0.0, "skip_last": 0}
    done = trained(recipe, validation={"data": "t.npz", "every": 2})
    (row,) = done.training
    judged = {step["step"]: step["validation"] for step in row["history"] if "validation" in step}
    pruned = {step: value for step, value in judged.items() if step >= 18}
    assert min(judged.values()) < min(pruned.values())
    assert row["best_step"] == min(pruned, key=lambda step: pruned[step])
    assert all(int(mask.sum()) == 6 for mask in seen[-1].masks.values())


def test_the_importance_is_the_running_mean_of_every_modules_scores_over_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out anew from the factors and their gradients; a step with a score that is not a number is left out."""
    from lrc.train.recipes.loraprune import GuidedPruning

    wanted: dict[str, Tensor] = {}
    steps = []
    graded = GuidedPruning.graded

    def watched(self: GuidedPruning, done: int) -> None:
        spoiled = done == 4
        if spoiled:
            self.factors["up.0"][1].grad[0, 0] = torch.nan  # type: ignore[index]
        for i in range(3):
            found = torch.zeros(12)
            for name, axis in ((f"up.{i}", 1), (f"gate.{i}", 1), (f"down.{i}", 0)):
                A, B = self.factors[name]
                assert A.grad is not None
                assert B.grad is not None
                estimate = B @ A - (B - B.grad) @ (A - A.grad)
                scores = (estimate * self.program.map_of(name).dense().weight).abs().sum(axis)
                found += scores / (scores.norm() + 1e-8)
            if bool(found.isfinite().all()):
                wanted[f"up.{i}"] = 0.9 * wanted.get(f"up.{i}", torch.zeros(12)) + 0.1 * found.detach()
        graded(self, done)
        for name in self.groups:
            torch.testing.assert_close(self.importance[name], wanted[name], rtol=1e-4, atol=1e-6)
        if spoiled:
            self.factors["up.0"][1].grad[0, 0] = 0  # type: ignore[index]
        steps.append(done)

    monkeypatch.setattr(GuidedPruning, "graded", watched)
    trained({"type": "loraprune", "width_kept": 0.5, "every": 3, "skip_first": 0.0, "skip_last": 0}, steps=8)
    assert steps == list(range(8))


def test_taylor_is_what_the_loss_changes_by_without_a_unit_in_every_row() -> None:
    """Gates written out anew on what `down` reads, over two batches; what another reader of it takes is not in its gradient."""
    adapt = {"type": "adapt", "targets": ["{up,gate,down}.*"], "method": "lora", "rank": 3, "alpha": 6}
    x, model = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)), mlps()
    program = lrc.compile(model, {"version": 1, "passes": [adapt]}, inputs=[x[:4]]).program
    fqns = [f"{name}.{i}" for name in ("up", "gate", "down") for i in range(3)]
    parameters = {name: p for name, p in program.graph_module.named_parameters() if p.requires_grad}
    context = Context(program, fqns, parameters, (), torch.optim.SGD(parameters.values()), 10, 10)
    options = LoraPruneRecipe(importance="taylor", width_kept=0.5, skip_first=0.0, skip_last=0, ema=0.0)
    made: Any = loraprune(context, options)
    for part in x.split(5):
        program(part)["output"].square().sum().backward()
    made.graded(0)
    assert made.changes == {}
    gates = [torch.ones(10, 12, requires_grad=True) for _ in range(3)]
    h = model.start(x)
    for up, gate, down, ones in zip(model.up, model.gate, model.down, gates, strict=True):
        h = h + down(ones * (up(h) * torch.sigmoid(gate(h))))
    model.head(h).square().sum().backward()
    for i, ones in enumerate(gates):
        assert ones.grad is not None
        expected = ones.grad.square().sum(0)
        torch.testing.assert_close(made.importance[f"up.{i}"], expected / expected.norm(), rtol=1e-4, atol=1e-6)


def test_training_by_taylor_ends_in_the_same_widths() -> None:
    recipe = {"type": "loraprune", "importance": "taylor", "width_kept": 0.5, "every": 2, "skip_first": 0.0, "skip_last": 0}
    done = trained(recipe, accumulate=2)
    assert [done.program.sites[f"up.{i}"].out_features for i in range(3)] == [6, 6, 6]


def test_heads_of_a_decoder_go_with_their_queries_and_the_rest_is_what_the_formula_says(llama: Path, data: Path) -> None:
    """Two of four queries share each key: q, k, v and o lose the same heads, in whole heads."""
    passes = [
        {"type": "adapt", "targets": ["layers:[0-9]"], "method": "lora", "rank": 2, "alpha": 4},
        {"type": "train", "objective": "causal_lm", "steps": 4, "batch_size": 2,
         "data": {"dataset": str(data / "stream.txt"), "max_length": 12},
         "recipe": {"type": "loraprune", "width_kept": 0.5, "every": 1, "skip_first": 0.0, "skip_last": 0}},
        {"type": "merge"},
    ]  # fmt: skip
    done = lrc.compile(str(llama), {"version": 1, "passes": passes}, cache=Path("cache"))
    shapes = {
        fqn.split(".")[-1]: (site.out_features, site.in_features) for fqn, site in done.program.sites.items() if "layers" in fqn
    }
    hidden, size, inner = 32, 8, 48
    assert shapes == {
        "q_proj": (2 * size, hidden), "k_proj": (size, hidden), "v_proj": (size, hidden), "o_proj": (hidden, 2 * size),
        "gate_proj": (inner // 2, hidden), "up_proj": (inner // 2, hidden), "down_proj": (hidden, inner // 2),
    }  # fmt: skip
    blocks = sum(site.map.cost().parameters for fqn, site in done.program.sites.items() if "layers" in fqn)
    assert blocks == (2 * 2 + 2) * size * hidden + 3 * hidden * inner // 2


def test_a_model_that_is_its_own_teacher_has_nothing_to_prune_by() -> None:
    """Adapters start at zero, so that the loss and every gradient are zero until something is pruned."""
    with pytest.raises(TrainError, match=r"no gradient has reached the adapters of up\.\d: no unit tells from another"):
        trained({"type": "loraprune", "width_kept": 0.5, "skip_first": 0.0}, data=None, objective="distillation")


def test_without_adapters_on_all_linears_of_a_group_it_is_refused() -> None:
    with pytest.raises(UsageError, match="all of whose linears have a trained low-rank adapter"):
        trained({"type": "loraprune", "width_kept": 0.5}, adapt="up.*")
