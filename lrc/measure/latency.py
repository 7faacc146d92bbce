"""Time of callables on this device, as medians and ratios of one interleaved run."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MEDIAN = 1.2533  # standard error of a median over that of a mean, of normal values
QUARTILES = 1.349  # distance of the quartiles over the standard deviation, of normal values


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
        return spread_of(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How long one callable takes over another: the median of the ratios of rounds, and two of its standard errors."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """The least that it may be."""
        return self.value - self.error

    @property
    def high(self) -> float:
        """The most that it may be."""
        return self.value + self.error


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Latency]:
    """Time every callable once a round, `rounds` times, after `warmup` rounds that do not count.

    Rounds go through all callables, every other round backwards, so that a slow spell of the machine meets all of them.
    before: what runs, untimed, right before each call. On a GPU the callable itself must wait for the device. Raises
    ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one round, got {rounds}")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if before is not None and name in before:
                before[name]()
            start = clock()
            calls[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def speedup(baseline: Latency, other: Latency) -> float:
    """Return how many times faster `other` is: the median over rounds of the two times of one round."""
    return statistics.median(b / o for b, o in zip(baseline.seconds, other.seconds, strict=True))


def ratio_to(baseline: Latency, other: Latency) -> Ratio:
    """Return how long `other` takes over `baseline`, with how far that is known; infinitely far after a single round."""
    found = [o / b for b, o in zip(baseline.seconds, other.seconds, strict=True)]
    error = MEDIAN * spread_of(found) / QUARTILES / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return Ratio(statistics.median(found), 2 * error)


def spread_of(values: tuple[float, ...] | list[float]) -> float:
    """Return the distance between the quartiles; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def joined(a: Mapping[str, Latency], b: Mapping[str, Latency]) -> dict[str, Latency]:
    """Return the rounds of two runs of the same callables, one run after the other."""
    return {name: Latency(a[name].seconds + b[name].seconds) for name in a}
