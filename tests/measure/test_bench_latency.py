"""How the benchmark of latency judges: layers and a clock whose times are known."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.measure import Latency, Ratio

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_latency")


class Machine:
    """A clock that layers move; every fifth stretch of time all of them are slow."""

    def __init__(self) -> None:
        self.now = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def clock(self) -> float:
        return self.now

    def model(self, *seconds: float, first: float = 0.0, noise: float = 0.02) -> nn.Module:
        machine = self

        class Layer(nn.Module):
            def __init__(self, takes: float) -> None:
                super().__init__()
                self.takes = takes

            def forward(self, x: Tensor) -> Tensor:
                slow = 4.0 if int(machine.now / 40) % 5 == 0 else 1.0
                draw = float(torch.rand((), generator=machine.generator))
                machine.now += slow * self.takes * (1 + noise * draw) + (0.0 if model.warm else first)
                return x

        class Model(nn.Module):
            warm = False

            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Layer(takes) for takes in seconds)

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = layer(x)
                self.warm = True
                return x

        model = Model()
        return model


def times(bench: Any, machine: Machine, compressed: tuple[float, ...]) -> dict[str, list[Latency]]:
    models = {"dense": machine.model(3.0, 1.0), "compressed": machine.model(*compressed), "again": machine.model(3.0, 1.0)}
    found: dict[str, list[Latency]] = bench.layer_times(models, torch.zeros(1), machine.clock)
    return found


def test_slow_spells_and_cold_first_runs_change_no_ratio(bench: Any) -> None:
    row = bench.judged(times(bench, Machine(), (1.5, 0.9)), [0, 1], predicted=0.6)
    assert row["measured"] == pytest.approx(2.4 / 4, rel=0.02)
    assert row["error"] == pytest.approx(0.0, abs=0.02)
    assert row["noise"] < 0.03
    assert row["slowest"] == pytest.approx(0.9, rel=0.03)
    assert row["slower_layers"] == []


def test_a_layer_that_got_slower_is_found_and_one_that_is_equal_is_not(bench: Any) -> None:
    row = bench.judged(times(bench, Machine(), (1.5, 1.2)), [0, 1], predicted=0.6)
    assert row["slower_layers"] == [1]
    assert bench.judged(times(bench, Machine(), (3.0, 1.0)), [0, 1], predicted=1.0)["slower_layers"] == []
    assert bench.judged(times(bench, Machine(), (1.5, 1.2)), [0], predicted=0.6)["slower_layers"] == []


@pytest.mark.parametrize(
    ("changed", "same", "expected"),
    [
        (Ratio(1.2, 0.05), Ratio(1.0, 0.02), True),
        (Ratio(1.2, 0.25), Ratio(1.0, 0.02), False),  # it may be faster
        (Ratio(1.2, 0.05), Ratio(1.1, 0.1), False),  # two equal ones differ by as much
        (Ratio(0.9, 0.01), Ratio(0.8, 0.01), False),  # it is faster
    ],
)
def test_slower_means_beyond_noise(bench: Any, changed: Ratio, same: Ratio, expected: bool) -> None:
    assert bench.slower(changed, same) is expected


def test_the_summary_counts_refusals_apart(bench: Any) -> None:
    row = bench.judged(times(bench, Machine(), (1.5, 1.2)), [0, 1], predicted=0.6) | {"asked": 0.4}
    found = bench.summary([row, {"refused": "too little"}], 5)
    assert found["triples"] == "2 of 5"
    assert (found["refused"], found["slower_layers_beyond_noise"], found["over_budget_beyond_noise"]) == (1, 1, 1)
    assert bench.summary([{"refused": "too little"}], 1)["median_error"] is None
