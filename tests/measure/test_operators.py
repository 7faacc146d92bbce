"""Tables of operator times: ratios of one interleaved run, found again by content."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.maps import Geometry, Indices, Lookup, Patches, Rows, fold, pivoted_structure, planned
from lrc.measure import Cache
from lrc.measure import operators as module
from lrc.measure.operators import clock_for, measure_operators, random_map

DENSE = {"map": "dense", "shape": [20, 12], "bias": True}
STRUCTURES: dict[str, Any] = {
    "present": DENSE,
    "two_factor 4": planned(Rows(), (20, 12), 4, bias=True).structure(),
    "pivoted 4": pivoted_structure(20, 4, 12, bias=True),
}
COSTS = {"dense": 8.0, "chain": 2.0, "pivoted": 3.0}


class Machine:
    """A clock, and maps that take a known time; slow spells come and go."""

    def __init__(self, spells: bool = False) -> None:
        self.now = 0.0
        self.calls = 0
        self.spells = spells

    def clock(self) -> float:
        return self.now

    def map(self, structure: dict[str, Any], *_: object) -> nn.Module:
        machine = self

        class Made(nn.Module):
            in_features = 12

            def forward(self, x: Tensor) -> Tensor:
                machine.calls += 1
                slow = 5.0 if machine.spells and (machine.calls // 40) % 3 == 0 else 1.0
                machine.now += slow * COSTS[structure["map"]] * len(x) / 1e3
                return x

        return Made()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(module, "random_map", made.map)
    return made


def measured(machine: Machine, folder: Path, rows: int = 2, **options: Any) -> dict[str, float]:
    return measure_operators(Cache(folder), STRUCTURES, (rows, 12), clock=machine.clock, **options)


def test_times_are_in_ms(machine: Machine, tmp_path: Path) -> None:
    assert measured(machine, tmp_path) == pytest.approx({"present": 16.0, "two_factor 4": 4.0, "pivoted 4": 6.0})


def test_slow_spells_change_no_ratio(machine: Machine, tmp_path: Path) -> None:
    machine.spells = True
    found = measured(machine, tmp_path)
    assert found["two_factor 4"] / found["present"] == pytest.approx(0.25)
    assert found["pivoted 4"] / found["present"] == pytest.approx(0.375)


def test_a_table_is_measured_once(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(machine, tmp_path)
    calls = machine.calls
    assert measured(machine, tmp_path) == first
    assert machine.calls == calls
    for change in ({"rows": 3}, {"dtype": torch.float64}):
        measured(machine, tmp_path, **change)
        assert machine.calls > calls
        calls = machine.calls
    monkeypatch.setattr(module, "place", lambda device: ("another device",))
    measured(machine, tmp_path)
    assert machine.calls > calls


def test_slow_operators_get_fewer_rounds(machine: Machine, tmp_path: Path) -> None:
    measured(machine, tmp_path, rows=1000)
    slow = machine.calls
    machine.calls = 0
    measured(machine, tmp_path, rows=1)
    assert slow < machine.calls


def test_the_place_holds_device_threads_and_torch() -> None:
    before = module.place(torch.device("cpu"))
    assert {"cpu", torch.__version__, torch.get_num_threads()} <= set(before)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert module.place(torch.device("cpu")) != before
        assert clock_for(torch.device("cpu")) is module.time.perf_counter
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("structure", STRUCTURES.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timed_maps_hold_ordinary_numbers(structure: dict[str, Any], dtype: torch.dtype) -> None:
    made = random_map(structure, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    y = made(torch.ones(3, 12, dtype=dtype))
    assert y.shape == (3, 20)
    assert y.dtype == dtype
    assert bool(torch.isfinite(y).all())
    assert made.exact().weight.abs().max() > 1e-3


def test_real_operators_have_real_times(tmp_path: Path) -> None:
    found = measure_operators(Cache(tmp_path), STRUCTURES, (2, 4, 12))
    assert set(found) == set(STRUCTURES)
    assert all(0 < ms < math.inf for ms in found.values())
    assert measure_operators(Cache(tmp_path), STRUCTURES, (2, 4, 12)) == found


def test_convolutions_and_tables_are_timed_on_what_they_read(tmp_path: Path) -> None:
    patches = Patches((3, 3), Geometry((2, 2), (1, 1), (1, 1)))
    images = {"present": fold(planned(patches, (8, 36), 2, bias=True)), "two_factor 2": planned(patches, (8, 36), 2, bias=True)}
    rows = {"present": Lookup(torch.zeros(9, 6)), "two_factor 2": planned(Indices(), (6, 9), 2, bias=False)}
    for maps, shape, indices in ((images, (2, 4, 8, 8), 0), (rows, (2, 5), 9)):
        structures = {name: made.structure() for name, made in maps.items()}
        found = measure_operators(Cache(tmp_path), structures, shape, indices=indices)
        assert all(0 < ms < math.inf for ms in found.values())
