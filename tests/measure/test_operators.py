"""Tables of operator times: ratios of one interleaved run, found again by content."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.maps import Geometry, Indices, Lookup, Patches, Rows, fold, pivoted_structure, planned
from lrc.measure import Cache, measure_latency
from lrc.measure import operators as module
from lrc.measure.operators import NOISE, bucket, clock_for, measure_operators, random_map

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
    found = measure_operators(Cache(folder), STRUCTURES, (rows, 12), clock=machine.clock, **options)
    return {name: ms for name, ms in found.items() if name != NOISE}


def test_times_are_in_ms(machine: Machine, tmp_path: Path) -> None:
    assert measured(machine, tmp_path) == pytest.approx({"present": 16.0, "two_factor 4": 4.0, "pivoted 4": 6.0})


def test_slow_spells_change_no_ratio(machine: Machine, tmp_path: Path) -> None:
    machine.spells = True
    found = measured(machine, tmp_path)
    assert found["two_factor 4"] / found["present"] == pytest.approx(0.25)
    assert found["pivoted 4"] / found["present"] == pytest.approx(0.375)


class Caches:
    """A clock and maps whose time is that of their weights' bytes: nothing from a cache, which holds what was read last."""

    def __init__(self, holds: int) -> None:
        self.holds = holds
        self.now = 0.0
        self.made = 0
        self.inside: dict[object, float] = {}  # what was read last is last

    def clock(self) -> float:
        return self.now

    def read(self, name: object, size: float) -> float:
        """Read some bytes; return how many of them came from memory."""
        missed = size - min(self.inside.pop(name, 0.0), size)
        self.inside[name] = min(size, self.holds)
        while sum(self.inside.values()) > self.holds:
            first = next(iter(self.inside))
            over = sum(self.inside.values()) - self.holds
            self.inside[first] -= min(over, self.inside[first])
            if not self.inside[first]:
                del self.inside[first]
        return missed

    def layer(self, size: float, name: object = None) -> Any:
        caches, self.made = self, self.made + 1
        own = name or self.made

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(0))

            def parameters(self, recurse: bool = True) -> Any:
                return iter([torch.empty(int(size) // 4, device="meta")])

            def forward(self, x: Tensor) -> Tensor:
                caches.now += size / 1e9 + caches.read(own, size) / 1e8
                return x

        return Layer()

    def map(self, structure: dict[str, Any], *_: object) -> nn.Module:
        return self.layer(SIZES[structure["map"]])  # type: ignore[no-any-return]

    def reader(self, size: int, _: object) -> Any:
        return lambda: self.read("rest of the model", size)


SIZES = {"dense": 8e6, "chain": 2e6, "pivoted": 3e6}


@pytest.mark.parametrize("others", [0, 3, 40])
def test_caches_are_as_the_rest_of_the_model_leaves_them(others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = Caches(holds=40_000_000)
    monkeypatch.setattr(module, "random_map", caches.map)
    monkeypatch.setattr(module, "reader", caches.reader)
    many = STRUCTURES | {f"two_factor {r}": planned(Rows(), (20, 12), r, bias=True).structure() for r in range(5, 16)}
    between = 2**23 * others
    found = measure_operators(Cache(tmp_path), many, (2, 12), between=between, clock=caches.clock)
    found.pop(NOISE)
    for name, kind in [("present", "dense"), ("two_factor 4", "chain"), ("two_factor 15", "chain"), ("pivoted 4", "pivoted")]:
        model = Caches(holds=40_000_000)
        layers = [model.layer(SIZES[kind])] + [model.layer(2**23) for _ in range(others)]
        for _ in range(3):
            begun = model.now
            layers[0](torch.zeros(1))
            spent = model.now - begun
            for layer in layers[1:]:
                layer(torch.zeros(1))
        assert found[name] == pytest.approx(1e3 * spent, rel=1e-6)


def test_models_of_like_size_share_tables() -> None:
    sizes = (0, 10**5, 3 * 2**20, 30 * 10**6, 35 * 10**6, 10**12)
    assert [bucket(size) for size in sizes] == [0, 0, int(2**21.5), 2**25, 2**25, 2**27]


def test_a_noisy_machine_is_measured_longer_and_says_how_noisy_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rounds: dict[float, int] = {}
    for noise in (0.0, 0.05, 20.0):
        quiet = Machine()
        monkeypatch.setattr(module, "random_map", quiet.map)
        monkeypatch.setitem(COSTS, "dense", 8.0)

        def clock(machine: Machine = quiet, noise: float = noise) -> float:
            machine.now += noise * 1e-3 * float(torch.rand((), generator=generator))
            return machine.now

        runs: list[int] = []
        monkeypatch.setattr(module, "measure_latency", lambda *a, runs=runs, **k: runs.append(1) or measure_latency(*a, **k))
        found = measure_operators(Cache(tmp_path / str(noise)), STRUCTURES, (1, 12), clock=clock)
        rounds[noise] = len(runs)
        least, most = {0.0: (0.0, 1e-9), 0.05: (1e-9, 0.02), 20.0: (0.02, 1.0)}[noise]
        assert least <= found[NOISE] <= most
    assert rounds == {0.0: 3, 0.05: 3, 20.0: 5}


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
    assert set(found) == {*STRUCTURES, NOISE}
    assert found.pop(NOISE) >= 0
    assert all(0 < ms < math.inf for ms in found.values())
    again = measure_operators(Cache(tmp_path), STRUCTURES, (2, 4, 12))
    assert {name: again[name] for name in found} == found


def test_convolutions_and_tables_are_timed_on_what_they_read(tmp_path: Path) -> None:
    patches = Patches((3, 3), Geometry((2, 2), (1, 1), (1, 1)))
    images = {"present": fold(planned(patches, (8, 36), 2, bias=True)), "two_factor 2": planned(patches, (8, 36), 2, bias=True)}
    rows = {"present": Lookup(torch.zeros(9, 6)), "two_factor 2": planned(Indices(), (6, 9), 2, bias=False)}
    for maps, shape, indices in ((images, (2, 4, 8, 8), 0), (rows, (2, 5), 9)):
        structures = {name: made.structure() for name, made in maps.items()}
        found = measure_operators(Cache(tmp_path), structures, shape, indices=indices)
        del found[NOISE]
        assert all(0 < ms < math.inf for ms in found.values())
