"""Budgets of time on tiny models: operator times are made up, so that every figure is known."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.errors import UsageError
from lrc.maps import Chain, Pivoted, restore
from lrc.run.budget import together
from lrc.run.plan import Plan

Compile = Callable[..., lrc.Compiled]
Asked = list[tuple[str, tuple[int, ...]]]
OVERHEAD = {"dense": 0.0, "chain": 0.1, "pivoted": 0.1}


def made_up(overhead: Mapping[str, float], asked: Asked) -> Callable[..., dict[str, float]]:
    """Times that are the FLOPs of a map, in thousands, and what its kind takes besides."""

    def measure(cache: Any, structures: Mapping[str, Any], shape: tuple[int, ...], **_: Any) -> dict[str, float]:
        sizes = shape[:-1]
        asked.append((str(structures["present"]["shape"]), sizes))
        with torch.device("meta"):
            return {
                name: restore(structure).cost(prod(sizes)).flops / 1e3 + overhead[structure["map"]]
                for name, structure in structures.items()
            }

    return measure


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What was measured, by shape and rows; times are made up."""
    found: Asked = []
    monkeypatch.setattr("lrc.run.budget.measure_operators", made_up(OVERHEAD, found))
    return found


def latencies(done: lrc.Compiled) -> list[tuple[float, float]]:
    found = [d.latency for d in done.plan.decisions]
    return [pair for pair in found if pair is not None]


@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("form", ["two_factor", "pivoted", "auto"])
@pytest.mark.parametrize("kept", [0.4, 0.7])
def test_predicted_times_are_within_the_budget(kept: float, form: str, allocate: str, compiled: Compile, asked: Asked) -> None:
    done = compiled(solver="kfac", rank={"latency_kept": kept}, form=form, allocate=allocate)
    before, after = (sum(pair[i] for pair in latencies(done)) for i in (0, 1))
    assert 0 < after <= kept * before
    for d in done.plan.decisions:
        assert d.latency is not None
        assert d.latency[1] < d.latency[0] or (d.rank is None and d.latency[1] == d.latency[0])
        if d.rank is not None:
            expected = done.program.map_of(d.name).cost(32).flops / 1e3 + 0.1
            assert d.latency[1] >= expected * (1 - 1e-9)  # the time of the next larger measured rank
    assert f"predicted latency of the targets: {before:.3g} → {after:.3g} ms ({after / before:.1%} kept)" in done.report
    assert f"{latencies(done)[0][0]:.3g} → {latencies(done)[0][1]:.3g}" in done.report
    assert Plan.from_json(done.plan.to_json()) == done.plan


def test_an_amount_of_time_is_met_or_refused_with_the_least(compiled: Compile, asked: Asked) -> None:
    done = compiled(rank={"latency_ms": 30.0}, form="two_factor")
    assert sum(after for _, after in latencies(done)) <= 30
    with pytest.raises(UsageError, match=r"rank\.latency_ms: expected at least .* \(the fastest ranks everywhere\)") as caught:
        compiled(rank={"latency_ms": 0.5}, form="two_factor")
    assert caught.value.exit_code == 2
    least = float(caught.value.expected.split()[2])
    assert sum(after for _, after in latencies(compiled(rank={"latency_ms": least}, form="two_factor"))) <= least


@pytest.mark.parametrize(("slow", "wanted"), [("chain", Pivoted), ("pivoted", Chain)])
def test_the_faster_form_is_the_one_that_is_made(
    slow: str, wanted: type, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.run.budget.measure_operators", made_up(OVERHEAD | {slow: 1e3}, []))
    done = compiled(rank={"latency_kept": 0.6})
    changed = [d.name for d in done.plan.decisions if d.rank is not None]
    assert changed
    assert {type(done.program.map_of(name)) for name in changed} == {wanted}


def test_layers_that_no_rank_makes_faster_stay(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc.run.budget.measure_operators", made_up({"dense": 0.0, "chain": 1e3, "pivoted": 1e3}, []))
    done = compiled(rank={"latency_kept": 1.0})
    assert {d.keep for d in done.plan.decisions} == {"no rank makes it faster"}
    with pytest.raises(UsageError, match=r"rank\.latency_kept: expected at least 1 "):
        compiled(rank={"latency_kept": 0.9})


def test_times_are_of_the_middle_calibration_batch_or_of_the_shapes_that_are_asked_for(compiled: Compile, asked: Asked) -> None:
    batches = [{"x": tiny.mlp_inputs(rows)} for rows in (4, 16, 32)]
    compiled(rank={"latency_kept": 0.7}, calibration=batches)
    assert {sizes for _, sizes in asked} == {(16,)}
    asked.clear()
    compiled(rank={"latency_kept": 0.7}, calibration=batches, at={"batch": 5})
    assert sorted(asked) == [("[10, 16]", (5,)), ("[16, 20]", (5,)), ("[20, 12]", (5,))]


def test_sites_that_are_alike_are_measured_once(llama: Path, data: Path, asked: Asked, in_tmp: Path) -> None:
    spec = tiny.factorize(targets=[tiny.LAYERS], solver="kfac", rank={"latency_kept": 0.7}, at={"batch": 2, "length": 10}) | {
        "calibration": {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 12}
    }
    done = lrc.compile(str(llama), spec)
    assert len(done.plan.decisions) == 7
    assert sorted(asked) == [(shape, (2, 10)) for shape in ("[16, 32]", "[32, 32]", "[32, 48]", "[48, 32]")]


@pytest.mark.parametrize("round_to", [2, 4])
def test_ranks_of_a_latency_are_multiples(round_to: int, compiled: Compile, asked: Asked) -> None:
    done = compiled(rank={"latency_kept": 0.8}, round_to=round_to, form="two_factor")
    assert all(d.rank is None or d.rank % round_to == 0 for d in done.plan.decisions)


def test_times_of_all_uses_add_up_and_rise_with_the_rank() -> None:
    table = {"present": 5.0, "two_factor 8": 2.0, "two_factor 16": 4.0, "two_factor 24": 3.0, "pivoted 8": 1.0}
    found = together([table, {name: 2 * ms for name, ms in table.items()}])
    assert found.present == 15.0
    assert found.products == {"two_factor": {8: 6.0, 16: 10.5, 24: 10.5}, "pivoted": {8: 3.0}}


def test_real_times_give_a_plan(compiled: Compile) -> None:
    """On tiny layers the overhead of two calls outweighs all: at a budget of everything whatever was measured is a plan."""
    done = compiled(rank={"latency_kept": 1.0})
    before, after = (sum(pair[i] for pair in latencies(done)) for i in (0, 1))
    assert 0 < after <= before
    again = compiled(rank={"latency_kept": 1.0})
    assert again.plan.to_json() == done.plan.to_json()  # the times are found again
