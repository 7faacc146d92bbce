"""The plan: what would be done, as data, and the same that is then done."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lrc_passes.factorize import Factorize
from lrc_passes.merge import Merge
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.measure.collect import Walk
from lrc.program import Program
from lrc.run import Plan, Session
from lrc.run.pipeline import make_plan, run_passes
from lrc.solvers import Decomposition, Moments, SvdSolver, svd
from lrc.spec.registry import SOLVERS, Rule

MakeSession = Callable[..., Session]


def factorize(rank: Any = 4, **options: Any) -> Factorize:
    return Factorize.model_validate({"solver": "kfac", "rank": rank, "form": "two_factor", **options})


def planned_and_done(program: Program, passes: Sequence[Any], session: MakeSession) -> tuple[Plan, Plan]:
    return make_plan(program, passes, session()), run_passes(program.clone(), passes, session())


PASSES: dict[str, list[Any]] = {
    "a rank": [factorize(4)],
    "a budget": [factorize({"params_kept": 0.5})],
    "an energy": [factorize({"energy": 0.7}, solver="whitened")],
    "the pivoted form": [factorize(4, form="pivoted")],
    "the smaller form": [factorize({"fraction": 0.5}, form="auto")],
    "layers that stay": [factorize(8, ignore=["middle"])],
    "two passes": [factorize(4, targets=["up"]), factorize({"params_kept": 0.6}, targets=["middle", "down"])],
    "a pass on what another left": [factorize(5), Merge(dense=True), factorize(4)],
    "the same pass twice": [factorize(4), factorize(4)],
    "compressed inputs": [factorize(4, solver={"type": "kfac", "propagate": "compressed"})],
}


@pytest.mark.parametrize("name", PASSES)
def test_a_plan_foretells_what_is_done(name: str, session: MakeSession) -> None:
    planned, done = planned_and_done(tiny.captured_mlp(), PASSES[name], session)
    facts = [
        [(d.index, d.name, d.rule, d.keep, d.rank, d.form, d.predicted, d.unit, d.before, d.after.parameters, d.after.flops)
         for d in plan.decisions]
        for plan in (planned, done)
    ]  # fmt: skip
    assert facts[0] == facts[1]
    assert planned.parameters == done.parameters
    assert planned.peak_memory == done.peak_memory
    assert done.bytes <= planned.bytes  # a neighbour may absorb an index


def test_a_plan_of_two_factors_is_the_plan_that_is_done(session: MakeSession) -> None:
    planned, done = planned_and_done(tiny.captured_mlp(), PASSES["a budget"], session)
    assert planned.to_json() == done.to_json()


def test_the_totals_are_those_of_the_program(session: MakeSession) -> None:
    program = tiny.captured_mlp().clone()
    before = program.size()
    plan = run_passes(program, [factorize(3)], session())
    after = program.size()
    assert (plan.parameters, plan.bytes) == ((before[0], after[0]), (before[1], after[1]))
    sizes = {"up": 3 * (20 + 12) + 20, "middle": 3 * (16 + 20), "down": 3 * (10 + 16) + 10}
    # a solver that moves the mean into the bias gives `middle` none: it has no bias to carry it
    assert {d.name: d.after.parameters for d in plan.decisions} == sizes
    assert after[0] == sum(sizes.values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_an_untied_weight_is_counted_twice_in_plan_and_result(session: MakeSession) -> None:
    program = lrc.capture(Tied(), {"ids": torch.arange(20).reshape(2, 10)})
    planned, done = planned_and_done(program, [factorize(3, solver="svd", tied="untie")], session)
    assert planned.parameters == done.parameters == (360, 360 + 3 * 42)
    assert planned.bytes == done.bytes


@pytest.mark.parametrize("name", PASSES)
def test_planning_does_not_change_the_program(name: str, session: MakeSession) -> None:
    program = tiny.captured_mlp()
    before, numbers = str(program), program.digest()
    make_plan(program, PASSES[name], session())
    assert str(program) == before
    assert program.digest() == numbers
    assert program.maps == {}


def test_a_plan_survives_json(session: MakeSession, tmp_path: Path) -> None:
    plan = make_plan(tiny.captured_mlp(), PASSES["layers that stay"], session())
    assert Plan.from_json(plan.to_json()) == plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_same_decisions_give_the_same_bytes(tmp_path: Path) -> None:
    """Neither the cache nor the order of the solvers' threads shows in a plan."""
    spec = tiny.factorize(solver="kfac", rank={"params_kept": 0.5})
    given = {"inputs": {"x": tiny.mlp_inputs()}, "calibration": tiny.calibration_of_mlp()}
    texts = [lrc.plan(tiny.mlp(), spec, cache=tmp_path / place, **given).to_json() for place in ("a", "a", "b")]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].endswith("}\n")


def test_the_json_holds_every_field_and_no_path(session: MakeSession, tmp_path: Path) -> None:
    plan = make_plan(tiny.captured_mlp(), PASSES["a budget"], session())
    data = json.loads(plan.to_json())
    assert list(data) == [field.name for field in dataclasses.fields(Plan)]
    assert str(tmp_path) not in plan.to_json()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "plan.json: expected a plan written by lrc, got Expecting property name"),
        ('{"format": 2, "decisions": []}', "plan.json: expected a plan of format 1, got 2"),
        ('{"format": 1}', "plan.json: expected a plan written by lrc, got 'decisions'"),
        ('{"format": 1, "decisions": [{"index": 0}]}', "plan.json: expected a plan written by lrc"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        Plan.from_json(text)


def counting(calls: list[str]) -> Rule[Any, Any]:
    """The exact decomposition, with a note of every weight that it is given."""

    def solve(weight: Tensor, bias: Any, moments: Moments, max_rank: int, options: Any, generator: Any) -> Decomposition:
        calls.append(str(tuple(weight.shape)))
        return svd(weight, bias, moments, max_rank, options, generator)

    return Rule("svd", SvdSolver, solve)


def test_another_budget_costs_no_new_decomposition(session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    SOLVERS.load()
    monkeypatch.setitem(SOLVERS._rules, "svd", counting(calls))
    program = tiny.captured_mlp()
    first = make_plan(program, [factorize({"params_kept": 0.5}, solver="svd")], session())
    assert sorted(calls) == ["(10, 16)", "(16, 20)", "(20, 12)"]
    calls.clear()
    for rank in ({"params_kept": 0.3}, {"energy": 0.8}, {"breakeven": 0.5}):
        again = make_plan(program, [factorize(rank, solver="svd")], session())
        assert again.decisions != first.decisions
    run_passes(program.clone(), [factorize({"params_kept": 0.3}, solver="svd")], session())
    assert calls == []


def test_a_lower_fixed_rank_costs_no_new_measuring(session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny.captured_mlp()
    make_plan(program, [factorize(5)], session())
    monkeypatch.setattr(Walk, "run", lambda *_: pytest.fail("measured again"))
    assert {d.rank for d in make_plan(program, [factorize(3)], session()).decisions} == {3}


def test_two_models_never_share_an_entry(session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    SOLVERS.load()
    monkeypatch.setitem(SOLVERS._rules, "svd", counting(calls))
    for seed in (0, 1):
        program = lrc.capture(tiny.mlp(seed), {"x": tiny.mlp_inputs()})
        make_plan(program, [factorize(3, solver="svd")], session())
    assert len(calls) == 6
