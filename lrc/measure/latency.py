"""Time of callables on this device, as medians and ratios of one interleaved run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """The seconds of one callable, a value for every round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, in seconds; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time every callable once a round, `rounds` times, after `warmup` rounds that do not count.

    Rounds go through all callables, every other round backwards, so that a slow spell of the machine meets all of them.
    On a GPU the callable itself must wait for the device. Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one round, got {rounds}")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            start = clock()
            calls[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def speedup(baseline: Latency, other: Latency) -> float:
    """Return how many times faster `other` is: the median over rounds of the two times of one round."""
    return statistics.median(b / o for b, o in zip(baseline.seconds, other.seconds, strict=True))
