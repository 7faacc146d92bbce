"""auto: the best option of every weight within one budget; what the plan says of it, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import SpecError, UsageError
from lrc.maps import restore
from lrc.program import Program
from lrc.run import Plan
from lrc.run.solved_pass import SolvedPass

Compile = Callable[..., lrc.Compiled]
FEW: list[dict[str, Any]] = [
    {"type": "quantize", "formats": ["nf2", "nf4"]},
    {"type": "factorize", "ranks": [0.2], "forms": ["two_factor"]},
    {"type": "quantized_factors", "ranks": [0.4], "formats": ["nf4"]},
    {"type": "split", "ranks": [0.1], "formats": ["nf2"], "iterations": 1},
    {"type": "prune", "densities": [0.2], "patterns": []},
]


class Wide(nn.Module):
    """Linears that are large enough for a few bits to pay, one without a bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 1)
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.conv(x[:, None]).sum(1))))


def inputs(rows: int = 64) -> Tensor:
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 96)


@cache
def wide() -> Program:
    """The program, captured once: `lrc.compile` does not change what it is given."""
    torch.manual_seed(0)
    return lrc.capture(Wide().eval(), {"x": inputs(4)})


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where options that were tried are kept for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compiled(cached: Path) -> Compile:
    """A function that compiles the program with the pass."""

    def run(**options: Any) -> lrc.Compiled:
        spec = {"version": 1, "passes": [{"type": "auto", "ways": FEW, **options}]}
        return lrc.compile(wide(), spec, calibration=[{"x": inputs()}], cache=cached)

    return run


def stored(done: lrc.Compiled) -> int:
    sites = [done.program.sites[fqn] for fqn in ("up", "down")]
    return sum(site.map.cost().bytes - site.map.bias_cost(1).bytes for site in sites)


DENSE = 4 * (96 * 128 + 128 * 64)


@pytest.mark.parametrize("kept", [0.07, 0.2, 0.6])
def test_the_budget_of_bytes_is_exact(compiled: Compile, kept: float) -> None:
    done = compiled(budget={"bytes_kept": kept})
    assert stored(done) <= kept * DENSE
    sized = compiled(budget={"size_mb": done.plan.bytes[1] / 1e6})
    assert sized.plan.bytes[1] <= done.plan.bytes[1]
    assert [d.form for d in sized.plan.decisions] == [d.form for d in done.plan.decisions]
    assert done.plan.bytes[1] == done.program.size()[1]


def test_the_plan_says_what_was_chosen_and_what_came_next(compiled: Compile) -> None:
    plan = compiled(budget={"bytes_kept": 0.1}).plan
    kept, up, down = plan.decisions
    assert kept.keep is not None
    assert "Conv" in kept.keep
    for d in (up, down):
        assert d.form
        assert d.predicted is not None
        assert d.unit == "nats per token"
        assert d.after.bytes < d.before.bytes
        assert d.notes[-1].startswith("runners-up: ")
        assert "kB, loss" in d.notes[-1]
    (note,) = [note for note in plan.notes if "allocation" in note]
    assert "of the least loss" in note
    assert Plan.from_json(plan.to_json()) == plan


def test_the_predicted_loss_of_a_linear_model_is_the_measured_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    x = inputs(4096)
    for ways in FEW:
        done = lrc.compile(
            model,
            {"version": 1, "passes": [{"type": "auto", "ways": [ways], "budget": {"bytes_kept": 0.6},
                                       "solver": {"type": "kfac", "focus": 0.0, "damping_in": 0.0, "damping_out": 0.0}}]},
            inputs={"input": x[:4]}, calibration=[{"input": x}], cache="cache",
        )  # fmt: skip
        (d,) = done.plan.decisions
        with torch.no_grad():
            measured = 0.5 * float((done.module(x) - model(x)).square().sum(1).mean())
        assert d.predicted == pytest.approx(measured, rel=0.15), d.form  # G is the mean over 4096 draws


def test_another_budget_tries_nothing_again(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(budget={"bytes_kept": 0.1})
    monkeypatch.setattr(SolvedPass, "call", None)
    again = compiled(budget={"bytes_kept": 0.1})
    assert again.plan == first.plan
    assert torch.equal(again.module(inputs()), first.module(inputs()))


def test_other_budgets_are_points_from_the_same_tables(compiled: Compile, cached: Path) -> None:
    def plan(kept: float, **more: Any) -> Plan:
        spec = {"version": 1, "passes": [{"type": "auto", "ways": FEW, "budget": {"bytes_kept": kept}}], **more}
        return lrc.plan(wide(), spec, calibration=[{"x": inputs()}], cache=cached)

    np.savez("labelled.npz", x=inputs().numpy(), labels=np.zeros(64, dtype=np.int64))
    judged = {"budgets": [0.6, 0.07, 0.001], "metric": "accuracy"}
    found = plan(0.2, pareto=judged, evaluate={"dataset": "labelled.npz"})
    assert [(p.budget, p.amount, p.chosen) for p in found.points] == [
        ("bytes_kept", 0.6, False), ("bytes_kept", 0.2, True), ("bytes_kept", 0.07, False), ("bytes_kept", 0.001, False),
    ]  # fmt: skip
    for point in found.points[:3]:
        alone = plan(point.amount)
        assert (point.parameters, point.bytes) == (alone.parameters[1], alone.bytes[1])
        assert point.loss == pytest.approx(sum(d.predicted or 0.0 for d in alone.decisions))
        rows = {"conv": 96}  # positions of a sample
        assert point.flops == sum(d.after.flops * rows.get(d.sites[0], 1) for d in alone.decisions)
        assert point.metric == "accuracy"
    assert found.points[3].bytes is None
    assert "expected at least" in found.points[3].note
    assert replace(found, points=()) == plan(0.2)
    with pytest.raises(UsageError, match=r"pareto\.budgets: bytes_kept: .* got 1\.5"):
        plan(0.2, pareto={"budgets": [1.5]})


def times_like_flops(cache: Any, structures: Any, shape: tuple[int, ...], **_: Any) -> dict[str, float]:
    return {name: restore(structure).cost(prod(shape[:-1])).flops / 1e6 for name, structure in structures.items()}


@pytest.mark.parametrize("budget", [{"latency_kept": 0.5}, {"latency_ms": 1.3}])
def test_a_budget_of_time_takes_what_is_faster(
    compiled: Compile, budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.run.budget.measure_operators", times_like_flops)
    plan = compiled(budget=budget).plan
    timed = [d for d in plan.decisions if d.latency]
    before, after = (sum(d.latency[i] for d in timed) for i in (0, 1))  # type: ignore[index]
    assert after <= budget.get("latency_ms", 0.5 * before)
    assert not any("nf" in (d.form or "") and "in" not in (d.form or "") for d in timed), "fewer bits save no time"
    assert "ms, loss" in " ".join(timed[0].notes)


@pytest.mark.slow
def test_times_are_measured_of_every_kind_of_option(compiled: Compile) -> None:
    plan = compiled(budget={"latency_kept": 1.0}).plan
    assert all(d.latency and d.latency[1] <= d.latency[0] for d in plan.decisions if d.name != "conv")


@pytest.mark.usefixtures("checked_here")
def test_what_was_chosen_is_saved_and_loaded(compiled: Compile) -> None:
    done = compiled(budget={"bytes_kept": 0.08})
    done.save("out")
    loaded = lrc.load("out")(x=inputs())
    assert torch.equal(next(iter(loaded.values())), done.module(inputs()))


@pytest.mark.parametrize(("step", "message"), [
    ({"budget": {"params_kept": 0.5}}, "bytes_kept, size_mb, latency_kept and latency_ms"),
    ({"budget": 8}, "bytes_kept, size_mb, latency_kept and latency_ms"),
    ({"budget": {"bytes_kept": 0.5}, "solver": "svd"}, "norm of `kfac`"),
    ({"budget": {"bytes_kept": 0.5}, "solver": {"type": "kfac", "propagate": "compressed"}}, "leave `propagate` out"),
    ({"budget": {"bytes_kept": 0.5}, "ways": ["quantise"]}, "Did you mean 'quantize'"),
    ({"budget": {"bytes_kept": 0.5}, "ways": []}, "ways"),
    ({"budget": {"bytes_kept": 0.5}, "ways": ["quantize", "quantize"]}, "is offered twice"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(compiled: Compile, step: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        compiled(**step)


def test_a_budget_that_nothing_fits_names_one_that_fits(compiled: Compile) -> None:
    with pytest.raises(UsageError, match=r"budget\.bytes_kept: expected at least 0\.0\d+ \(the smallest options everywhere\)"):
        compiled(budget={"bytes_kept": 0.01})


def test_bytes_kept_is_a_budget_of_factorize_too() -> None:
    spec = tiny.factorize(rank={"bytes_kept": 0.5}, form="two_factor")
    done = lrc.compile(wide(), spec, calibration=[{"x": inputs()}], cache="cache")
    assert 0.45 * DENSE <= stored(done) <= 0.5 * (DENSE + 4 * 2)
