"""prune, structured: budgets, criteria, what the plan says, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from lrc_passes.pruners.unit_scores import of_units
from lrc_passes.pruners.widths import Widths
from nets import image_program, masked, net
from torch import Tensor, nn

import lrc
from lrc.errors import SolverError, SpecError, UsageError
from lrc.measure.gates import by_gates
from lrc.program.capture import capture_module
from lrc.program.dependency import Group, Member, find_groups
from lrc.solvers import Moments
from lrc.solvers.scores import SCORES

BATCH = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


def pruned(
    model: nn.Module | None = None, x: Tensor = BATCH, *, then: Any = (), targets: Any = ("**",), **method: Any
) -> lrc.Compiled:
    """Prune a network."""
    step = {"type": "prune", "targets": list(targets), "method": {"type": "structured", **method}}
    spec = {"version": 1, "passes": [step, *then]}
    return lrc.compile(model or net("residual"), spec, inputs=[x], calibration=[(x,)], cache=Path("cache"))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_a_budget_of_parameters_is_met_and_nearly_used(criterion: str, allocate: str) -> None:
    done = pruned(criterion=criterion, allocate=allocate, amount={"params_kept": 0.6})
    before = sum(d.before.parameters for d in done.plan.decisions)
    after = sum(d.after.parameters for d in done.plan.decisions)
    assert 0.4 * before < after <= 0.6 * before
    assert after == sum(site.map.cost().parameters for site in done.program.sites.values())
    note = next(note for note in done.plan.notes if note.startswith("prune"))
    assert f"parameters of the targets: {before} → {after}" in note


def test_widths_and_flops_are_budgets_too() -> None:
    done = pruned(amount={"width_kept": 0.5})
    assert [done.program.sites[f].out_features for f in ("stem", "a1", "a2", "b1", "down")] == [4, 4, 4, 6, 6]
    assert [done.program.sites[f].out_features for f in ("stem", "head")] == [4, 5]
    flops = pruned(amount={"flops_kept": 0.5})
    assert any("FLOPs per sample of the targets: " in note for note in flops.plan.notes)
    round_four = pruned(amount={"width_kept": 0.7}, round_to=4)
    assert {round_four.program.sites[f].out_features for f in ("stem", "b1")} == {4, 8}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_the_weakest_units_go(criterion: str) -> None:
    """Rows of zeros, which nothing reads, are the first to go, whatever the criterion."""
    model = net("residual")
    assert isinstance(model.a1, nn.Conv2d)
    assert isinstance(model.a2, nn.Conv2d)
    with torch.no_grad():
        model.a1.weight[[1, 4, 6]] = 0
        model.a2.weight[:, [1, 4, 6]] = 0
    done = pruned(model, targets=["a1", "a2"], criterion=criterion, amount={"width_kept": 0.625})
    with torch.no_grad():
        torch.testing.assert_close(done.module(BATCH), model(BATCH), rtol=0, atol=1e-5)
    assert torch.equal(done.program.sites["a1"].map.dense().weight, model.a1.weight[[0, 2, 3, 5, 7]].detach().flatten(1))


def test_scores_of_a_linear_are_their_formulas() -> None:
    W, x = torch.randn(5, 3), torch.randn(40, 3).double()
    moments = Moments(gram=x.T @ x / 40)
    magnitude, wanda = (SCORES[name].entries for name in ("magnitude", "wanda"))
    assert magnitude is not None
    assert wanda is not None
    torch.testing.assert_close(magnitude(W, moments), W**2)
    torch.testing.assert_close(wanda(W, moments).sqrt() * 40**0.5, W.abs() * x.norm(dim=0).float())


def test_the_length_of_a_row_before_a_batch_norm_says_nothing() -> None:
    """Rows of any length give the same after the norm: the cut is that of the columns which read it."""
    model = net("residual")
    assert isinstance(model.a1, nn.Conv2d)
    assert isinstance(model.a2, nn.Conv2d)
    length = model.a2.weight.detach().double().square().sum((0, 2, 3))
    kept = length.argsort()[4:].sort().values
    with torch.no_grad():
        model.a1.weight[kept] *= 1e-2
    done = pruned(model, targets=["a1", "a2"], amount={"width_kept": 0.5})
    assert torch.equal(done.program.sites["a1"].map.dense().weight, model.a1.weight[kept].detach().flatten(1))


def test_rows_count_where_no_batch_norm_follows_or_nothing_else_counts() -> None:
    index = np.array([[0], [1]])
    up, down = Member(("site", "up", "out"), index), Member(("site", "down", "in"), index)
    summed = {("up", "out"): torch.tensor([3.0, 1.0]), ("down", "in"): torch.tensor([10.0, 20.0])}
    both, alone = Group("up", "channels", 2, (up, down)), Group("up", "channels", 2, (up,))
    score = SCORES["magnitude"]
    assert of_units(both, summed, score).tolist() == [13, 21]
    assert of_units(both, summed, score, {"up"}).tolist() == [10, 20]
    assert of_units(alone, summed, score, {"up"}).tolist() == [3, 1]


def test_taylor_is_the_squared_change_by_all_readers_of_a_unit_together() -> None:
    """Readers of the same rows act together, signs and all; readers of others are added as squares."""
    index = np.array([[0, 1], [2, 3]])
    members = (
        Member(("site", "up", "out"), index), Member(("site", "a", "in"), index), Member(("site", "b", "in"), index),
        Member(("site", "pooled", "in"), index),
    )  # fmt: skip
    group = Group("up", "features", 2, members)
    a, b, pooled = torch.randn(6, 4), torch.randn(6, 4), torch.randn(2, 4)
    found = by_gates([group], [{"a": a, "b": b, "pooled": pooled}])["up"]
    together = (a + b).double().reshape(6, 2, 2).sum(2).square().sum(0)
    torch.testing.assert_close(found, together + pooled.double().reshape(2, 2, 2).sum(2).square().sum(0))


def test_over_all_groups_taylor_compares_units_for_their_cost_and_the_others_within_their_group() -> None:
    """Both groups have the same pattern of scores, one on a hundredth of the scale."""
    groups = [Group(name, "features", 4, ()) for name in ("large", "small")]
    scores = {"large": torch.tensor([1.0, 2.0, 3.0, 4.0]), "small": torch.tensor([0.01, 0.02, 0.03, 0.04])}
    widths = Widths(tiny.captured_mlp(), None, groups, scores, {"large": 4, "small": 4}, [])  # type: ignore[arg-type]
    cost = {"large": 1000.0, "small": 1.0}
    at = {a: widths.by_importance(lambda kept: sum(cost[n] * k for n, k in kept.items()), 1, absolute=a) for a in (True, False)}
    assert at[False](0.5) == {"large": 2, "small": 2}
    assert at[True](0.5) == {"large": 1, "small": 4}, "a thousandth of the cost for a hundredth of the loss"


def test_merging_afterwards_leaves_the_masked_models_output() -> None:
    program, x = image_program("residual")
    groups = find_groups(program)
    merge = {"type": "merge"}
    done = pruned(net("residual"), x, then=[merge], amount={"width_kept": 0.5})
    gone = {g.name: np.sort(_gone(program, g)) for g in groups.groups}
    expected = masked(program, groups, gone)
    with torch.no_grad():
        assert (done.program(x)["output"] - expected(x)["output"]).abs().max() <= 1e-6


def _gone(program: Any, group: Any) -> list[int]:
    """Return the half of a group's units whose weights are shortest: columns, and rows that no batch norm follows."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.site is None or (member.slot[2] == "out" and member.site != "down"):  # all others stand before a norm
            continue
        weight = program.sites[member.site].map.dense().weight.double()
        if member.slot[2] == "out":
            total += weight.square().sum(1)[torch.from_numpy(member.index)].sum(1)
        else:
            columns = weight.reshape(len(weight), member.index.size, -1) if member.index.shape[1] == 1 else weight[..., None]
            total += columns.square().sum((0, 2))[torch.from_numpy(member.index)].sum(1)
    return total.argsort()[: group.units // 2].tolist()


def test_the_plan_says_what_is_kept_and_why() -> None:
    plan = lrc.plan(
        net("residual"),
        {
            "version": 1,
            "passes": [
                {"type": "prune", "targets": ["{a1,a2,head}"], "method": {"type": "structured", "amount": {"width_kept": 0.5}}}
            ],
        },
        inputs=[BATCH],
    )
    told = {d.sites[0]: d for d in plan.decisions}
    assert told["a1"].notes == ("gives 4 of 8 channels (a1)",)
    assert told["a2"].notes == ("reads 4 of 8 channels (a1)",)
    assert told["head"].keep == "the model gives it as an output"
    assert "prune: the channels of stem stay, for stem is linked with them and is no target" in plan.notes


def test_pruning_twice_by_the_same_width_goes_on_and_by_everything_changes_nothing() -> None:
    whole = pruned(amount={"width_kept": 1.0})
    assert all(d.keep for d in whole.plan.decisions)
    torch.testing.assert_close(whole.module(BATCH), net("residual")(BATCH))


def test_factors_are_pruned_as_they_are() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(6, 12)
    factorize = {"type": "factorize", "solver": "svd", "rank": 4, "form": "two_factor"}
    prune = {"type": "prune", "method": {"type": "structured", "amount": {"params_kept": 0.7}}}
    done = lrc.compile(model, {"version": 1, "passes": [factorize, prune]}, inputs=[x])
    up = done.program.sites["up"].map
    assert repr(up).startswith("Chain[")
    assert up.out_features == done.program.sites["down"].map.in_features < 16
    before, after = (sum(getattr(d, when).parameters for d in done.plan.of_pass(1)) for when in ("before", "after"))
    assert after <= 0.7 * before


def test_impossible_and_unclear_amounts_are_refused() -> None:
    with pytest.raises(UsageError, match="expected at least 0"):
        pruned(amount={"params_kept": 0.001})
    with pytest.raises(SpecError, match="give one of `width_kept`, `params_kept` and `flops_kept`"):
        pruned(amount={"params_kept": 0.5, "width_kept": 0.5})
    with pytest.raises(SpecError, match="unknown key `width`"):
        pruned(amount={"width": 0.5})
    with pytest.raises(SpecError, match="magnitude"):
        pruned(amount={"width_kept": 0.5}, criterion="size")


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_scores_that_are_not_finite_put_units_in_no_order(criterion: str) -> None:
    model = net("residual")
    assert isinstance(model.a2, nn.Conv2d)
    with torch.no_grad():
        model.a2.weight[3, 2] = torch.nan
    with pytest.raises(SolverError, match=f"the scores of .* by {criterion}: expected finite numbers"):
        pruned(model, criterion=criterion, amount={"width_kept": 0.5})


def test_nothing_to_cut_is_said() -> None:
    program = capture_module(nn.Linear(4, 3), [torch.randn(2, 4)])
    spec = {"version": 1, "passes": [{"type": "prune", "method": {"type": "structured", "amount": {"width_kept": 0.5}}}]}
    plan = lrc.plan(program, spec)
    assert "prune: nothing among the targets can be cut" in plan.notes
    assert all(d.keep == "the model gives it as an output" for d in plan.decisions)
