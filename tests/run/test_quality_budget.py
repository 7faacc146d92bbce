"""A budget of quality on the tiny perceptron: labels are what the dense model says, so that its accuracy is 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import lrc
from lrc.errors import SpecError, UsageError
from lrc.run.plan import Plan
from lrc.run.session import Session
from lrc.run.trials import Trials

Run = Callable[..., lrc.Compiled]
METRIC = {"type": "accuracy", "dataset": "labelled.npz"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A function that compiles the perceptron, or plans it, under a budget of quality."""
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    with torch.no_grad():
        np.savez("labelled.npz", x=x.numpy(), labels=tiny.mlp()(x).argmax(1).numpy())

    def run(
        quality: dict[str, Any], *, plan: bool = False, evaluate: dict[str, Any] | None = None, **options: Any
    ) -> lrc.Compiled | Plan:
        spec = tiny.factorize(**({"solver": "kfac", "rank": {"quality": quality}} | options))
        spec |= {"evaluate": evaluate or {}}
        act = lrc.plan if plan else lrc.compile
        return act(
            tiny.captured_mlp(), spec, inputs={"x": tiny.mlp_inputs()}, calibration=tiny.calibration_of_mlp(),
            cache=tmp_path / "cache",
        )  # type: ignore[return-value]  # fmt: skip

    return run  # type: ignore[return-value]


def accuracy(done: lrc.Compiled) -> float:
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    with torch.no_grad():
        return float((done.module(x).argmax(1) == tiny.mlp()(x).argmax(1)).double().mean())


@pytest.mark.parametrize("bound", [{"max_degradation": 0.1}, {"at_least": 0.9}])
@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_the_result_is_within_the_bound_and_is_what_was_measured(run: Run, bound: dict[str, float], allocate: str) -> None:
    done = run({"metric": METRIC, **bound}, allocate=allocate)
    (chosen,) = [point for point in done.plan.points if point.chosen]
    assert accuracy(done) == pytest.approx(chosen.value)
    assert accuracy(done) >= 0.9
    assert chosen.parameters == done.plan.parameters[1] < done.plan.parameters[0]
    assert chosen.bytes >= done.plan.bytes[1]  # neighbours may absorb index vectors
    smaller = [point.value for point in done.plan.points if point.parameters < chosen.parameters]
    assert all(value is not None and value < 0.9 for value in smaller)
    assert "is the smallest found to meet the bound, accuracy" in done.report
    assert Plan.from_json(done.plan.to_json()) == done.plan


def test_no_step_decomposes_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    solve = Session.solve
    monkeypatch.setattr(Session, "solve", lambda self, site, *a: solved.append(site.fqn) or solve(self, site, *a))
    done = run({"metric": METRIC, "at_least": 0.9}, solver={"type": "kfac", "modules": False})
    assert len(done.plan.points) == 8
    assert sorted(solved) == ["down", "middle", "up"]


def test_a_run_takes_over_what_an_earlier_one_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = {"metric": METRIC, "at_least": 0.9}
    planned = run(quality, plan=True)

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("everything was measured before")

    monkeypatch.setattr("lrc.run.trials.evaluate", no_more)
    assert run(quality).plan.points == planned.points  # type: ignore[attr-defined]  # a plan
    monkeypatch.undo()
    asked = []
    value = Trials._value
    monkeypatch.setattr(Trials, "_value", lambda self, *a: asked.append(a) or value(self, *a))
    np.savez("labelled.npz", x=tiny.mlp_inputs(16).numpy(), labels=np.zeros(16, dtype=np.int64))
    assert run({"metric": METRIC, "at_least": 0.0}, plan=True).points != planned.points  # type: ignore[attr-defined]
    assert asked


def test_a_later_pass_is_measured_against_the_model_before_the_first(run: Run, tmp_path: Path) -> None:
    spec = tiny.factorize(solver="svd", targets=["up"], rank=3)
    quality = {"metric": METRIC, "max_degradation": 0.0}
    spec["passes"] += tiny.factorize(solver="svd", targets=["middle"], rank={"quality": quality})["passes"]
    done = lrc.compile(tiny.captured_mlp(), spec, inputs={"x": tiny.mlp_inputs()}, cache=tmp_path / "cache")
    assert [point.index for point in done.plan.points] == [1]
    assert next(d for d in done.plan.decisions if d.name == "middle").keep == "the model itself misses the bound of quality"


def test_what_is_measured_is_compressed_step_by_step_where_the_pass_is(run: Run) -> None:
    done = run({"metric": METRIC, "at_least": 0.9}, solver={"type": "kfac", "propagate": "compressed"})
    (chosen,) = [point for point in done.plan.points if point.chosen]
    assert accuracy(done) == pytest.approx(chosen.value)


def test_a_bound_without_metric_or_data_is_refused_before_anything_is_decomposed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "decompose", lambda *_: pytest.fail("nothing may be decomposed"))
    with pytest.raises(UsageError, match=r"passes\.0\.rank\.quality\.metric: .* `evaluate\.metrics` has none"):
        run({"at_least": 0.9})
    with pytest.raises(UsageError, match=r"has accuracy, kl"):
        run({"at_least": 0.9}, evaluate={"metrics": ["accuracy", "kl"], "dataset": "labelled.npz"})
    with pytest.raises(UsageError, match=r"evaluate\.accuracy: no data\. Set `evaluate\.dataset`"):
        run({"metric": "accuracy", "at_least": 0.9})
    with pytest.raises(UsageError, match=r"passes\.0\.rank\.quality\.metric\.dataset: .*no such file"):
        run({"metric": {"type": "accuracy", "dataset": "absent.npz"}, "at_least": 0.9})
    with pytest.raises(SpecError, match="has nothing to choose from"):
        run({"metric": METRIC, "at_least": 0.9}, solver="random")


def test_the_metric_of_the_spec_is_taken_where_there_is_one(run: Run) -> None:
    evaluate = {"metrics": ["accuracy"], "dataset": "labelled.npz"}
    assert run({"at_least": 0.9}, evaluate=evaluate).plan.points == run({"metric": METRIC, "at_least": 0.9}).plan.points
