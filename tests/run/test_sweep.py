"""Other budgets of a pass: planned from the same decompositions, printed, and drawn in the report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import lrc
from lrc.errors import UsageError
from lrc.report.html import html_report
from lrc.report.tables import plain_report
from lrc.run.plan import Plan, Point
from lrc.run.session import Session

Make = Callable[..., Plan]
ALONE = {"type": "kfac", "modules": False}  # no groups: the figures of sites add up
BUDGETS = [0.9, 0.4, 0.6, 0.02]


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """A function that plans the perceptron with other budgets beside its own."""
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    with torch.no_grad():
        np.savez("labelled.npz", x=x.numpy(), labels=tiny.mlp()(x).argmax(1).numpy())

    def make(pareto: dict[str, Any] | None, **options: Any) -> Plan:
        spec = tiny.factorize(**({"solver": ALONE, "rank": {"params_kept": 0.6}} | options))
        spec |= {"pareto": pareto, "evaluate": {"dataset": "labelled.npz"}}
        return lrc.plan(
            tiny.captured_mlp(), spec, inputs={"x": tiny.mlp_inputs()}, calibration=tiny.calibration_of_mlp(),
            cache=tmp_path / "cache",
        )  # fmt: skip

    return make


def test_every_point_is_the_plan_of_its_budget(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    solve = Session.solve
    monkeypatch.setattr(Session, "solve", lambda self, site, *a: solved.append(site.fqn) or solve(self, site, *a))
    plan = made({"budgets": BUDGETS})
    assert len(solved) == 3
    assert [(p.budget, p.amount) for p in plan.points] == [("params_kept", kept) for kept in (0.9, 0.6, 0.4, 0.02)]
    assert [p.chosen for p in plan.points] == [False, True, False, False]
    for point in plan.points[:3]:
        alone = made(None, rank={"params_kept": point.amount})
        assert alone.points == ()
        assert (point.parameters, point.bytes) == (alone.parameters[1], alone.bytes[1])
        assert point.loss == pytest.approx(sum(d.predicted or 0.0 for d in alone.decisions))
        assert point.flops == sum(d.after.flops for d in alone.decisions)
    assert plan.points[3].parameters is None
    assert "expected at least" in plan.points[3].note
    assert replace(plan, points=()) == made(None)
    assert Plan.from_json(plan.to_json()) == plan


def test_amounts_are_those_of_the_passes_own_budget(made: Make) -> None:
    plan = made({"budgets": [0.0019, 0.0022]}, rank={"size_mb": 0.002})
    assert [(p.budget, p.amount, p.chosen) for p in plan.points] == [
        ("size_mb", 0.0022, False), ("size_mb", 0.002, True), ("size_mb", 0.0019, False),
    ]  # fmt: skip
    assert all(p.bytes is not None and p.bytes <= p.amount * 1e6 for p in plan.points)
    by_flops = made({"budgets": [0.5]}, rank={"flops_kept": 0.6}).points
    whole = 2 * (12 * 20 + 20 * 16 + 16 * 10) + 20 + 10
    assert [p.flops is not None and p.flops <= p.amount * whole for p in by_flops] == [True, True]


def test_a_metric_is_measured_on_the_model_of_every_budget(made: Make) -> None:
    plan = made({"budgets": BUDGETS, "metric": "accuracy"})
    assert [p.metric for p in plan.points] == ["accuracy"] * 3 + [None]
    done = lrc.compile(
        tiny.captured_mlp(), tiny.factorize(solver=ALONE, rank={"params_kept": 0.4}),
        inputs={"x": tiny.mlp_inputs()}, calibration=tiny.calibration_of_mlp(),
    )  # fmt: skip
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    with torch.no_grad():
        accuracy = float((done.module(x).argmax(1) == tiny.mlp()(x).argmax(1)).double().mean())
    assert plan.points[2].value == pytest.approx(accuracy)


def test_what_cannot_be_varied_says_so(made: Make) -> None:
    plan = made({"budgets": [0.5]}, rank=3)
    assert plan.points == ()
    assert "pareto: the ranks of `factorize` come from no budget, so there is none to vary" in plan.notes
    with pytest.raises(UsageError, match=r"pareto\.budgets: params_kept: input should be less than or equal to 1, got 1\.5"):
        made({"budgets": [1.5]})


def test_the_table_and_the_report_show_the_points(made: Make) -> None:
    plan = made({"budgets": BUDGETS, "metric": "accuracy"})
    text = plain_report(plan)
    assert "budgets that were tried (* is the one of this plan)" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("params_kept")] == ["0.9", "0.6", "0.4", "0.02"]
    page = html_report(plan, {}, {}, "")
    assert page.count("<title>pass 0: ") == 4  # loss and accuracy against size and FLOPs
    assert "Budgets that were tried" in page
    assert "Budgets that were tried" not in html_report(made(None), {}, {}, "")


def test_the_report_shows_times_where_they_were_measured(made: Make) -> None:
    plan = made(None)
    assert "<th class=n>ms" not in html_report(plan, {}, {}, "")
    timed = replace(plan, decisions=tuple(replace(d, latency=(2.0, 1.25)) for d in plan.decisions))
    page = html_report(timed, {}, {}, "")
    assert page.count("<th class=n>ms") == 1
    assert page.count("<td class=n>2 → 1.25") == len(plan.decisions)
    points = tuple(Point(0, "latency_kept", k, 10, 40, 100.0, 2 * k, 1 - k, "nats") for k in (0.9, 0.5))
    assert "predicted ms" in html_report(replace(timed, points=points), {}, {}, "")
