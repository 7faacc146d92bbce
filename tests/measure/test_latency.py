"""Times of one interleaved run, told by a clock that the test turns."""

import math
from collections.abc import Callable

import pytest
import torch

from lrc.measure import Latency, Ratio, joined, measure_latency, ratio_to, speedup


class Clock:
    """A clock that only moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += seconds()

        return call


def test_rounds_go_through_all_callables_and_every_other_one_backwards() -> None:
    clock = Clock()
    calls = {name: clock.work(name, lambda: 1.0) for name in ("a", "b", "c")}
    measure_latency(calls, rounds=4, warmup=0, clock=clock)
    assert "".join(clock.log) == "abc" + "cba" + "abc" + "cba"


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_warmup_rounds_run_and_do_not_count(warmup: int) -> None:
    clock = Clock()
    times = iter([100.0] * warmup + [1.0, 2.0, 3.0])
    found = measure_latency({"a": clock.work("a", lambda: next(times))}, rounds=3, warmup=warmup, clock=clock)
    assert found["a"].seconds == (1.0, 2.0, 3.0)
    assert len(clock.log) == warmup + 3


def test_every_callable_has_one_time_a_round_in_the_order_of_rounds() -> None:
    clock = Clock()
    turn = {"fast": 0, "slow": 0}

    def seconds(name: str, base: float) -> Callable[[], float]:
        def take() -> float:
            turn[name] += 1
            return base * turn[name]

        return take

    calls = {name: clock.work(name, seconds(name, base)) for name, base in (("fast", 1.0), ("slow", 3.0))}
    found = measure_latency(calls, rounds=5, warmup=0, clock=clock)
    assert list(found) == ["fast", "slow"]
    assert found["fast"].seconds == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert found["slow"].seconds == (3.0, 6.0, 9.0, 12.0, 15.0)


def test_a_slow_spell_of_the_machine_does_not_change_the_ratio() -> None:
    clock = Clock()
    spell = iter([1.0] * 6 + [7.0] * 8 + [1.0] * 6)  # each round meets it whole
    factor = {"now": 1.0, "count": 0}

    def busy(base: float) -> Callable[[], float]:
        def take() -> float:
            if factor["count"] % 2 == 0:
                factor["now"] = next(spell)
            factor["count"] += 1
            return base * factor["now"]

        return take

    calls = {"dense": clock.work("dense", busy(2.0)), "small": clock.work("small", busy(1.0))}
    found = measure_latency(calls, rounds=20, warmup=0, clock=clock)
    assert speedup(found["dense"], found["small"]) == 2.0
    assert speedup(found["small"], found["dense"]) == 0.5


def test_a_ratio_is_a_median_with_two_standard_errors() -> None:
    base = Latency(tuple([1.0] * 400))
    found = ratio_to(base, Latency(tuple(torch.normal(2.0, 0.1, (400,), generator=torch.Generator().manual_seed(0)).tolist())))
    assert found.value == pytest.approx(2.0, abs=0.02)
    assert found.error == pytest.approx(2 * 1.2533 * 0.1 / 400**0.5, rel=0.2)
    assert (found.low, found.high) == (found.value - found.error, found.value + found.error)
    assert ratio_to(base, base) == Ratio(1.0, 0.0)
    assert ratio_to(Latency((1.0,)), Latency((2.0,))) == Ratio(2.0, math.inf)


def test_what_runs_before_a_call_is_not_timed() -> None:
    clock = Clock()
    calls = {name: clock.work(name, lambda: 1.0) for name in ("a", "b")}
    before = {"a": clock.work("-", lambda: 7.0)}
    found = measure_latency(calls, rounds=2, warmup=0, clock=clock, before=before)
    assert "".join(clock.log) == "-ab" + "b-a"
    assert found["a"].seconds == found["b"].seconds == (1.0, 1.0)
    assert joined(found, found)["a"].seconds == (1.0,) * 4


def test_a_speedup_is_the_median_of_the_ratios_of_rounds() -> None:
    assert speedup(Latency((4.0, 9.0, 100.0)), Latency((2.0, 3.0, 1.0))) == 3.0
    with pytest.raises(ValueError, match="shorter"):
        speedup(Latency((1.0, 2.0)), Latency((1.0,)))


def test_a_latency_has_a_median_and_the_distance_of_its_quartiles() -> None:
    latency = Latency((5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 6.0))
    assert latency.median == 4.0
    assert latency.spread == 4.0  # from 2 to 6: one outlier moves neither
    assert Latency((3.0,)).spread == 0.0
    assert Latency((3.0,)).median == 3.0


def test_fewer_than_one_round_is_refused_and_nothing_runs() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="expected at least one round, got 0"):
        measure_latency({"a": clock.work("a", lambda: 1.0)}, rounds=0, clock=clock)
    assert clock.log == []
    assert measure_latency({}, rounds=2, clock=clock) == {}
