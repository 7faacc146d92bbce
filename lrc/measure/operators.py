"""Times of maps on this device, by their structure alone: what a budget of latency looks up.

A layer finds the caches as the rest of its model has left them. In a model that fits into them its weights are still there, in
a larger one they come from memory, which for few rows takes most of the time: so every map is called once, then as much memory
is read as the rest of the model takes, then the map is timed on an input that was just touched.
"""

import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lrc.maps import LinearMap, Sparse, Structure, restore
from lrc.measure.cache import Cache, digest
from lrc.measure.latency import Latency, joined, measure_latency, ratio_to
from lrc.solvers.splits.support import strongest

SECONDS = 1.5  # what the rounds of one table take, about
PATIENCE = 3  # how many times as long they may take on a noisy machine
WANTED = 0.02  # twice the standard error of a ratio at which a table is good enough
ROUNDS = (9, 60)
PRESENT = "present"
NOISE = "noise"
AGAIN = "again"
LARGEST = 2**27  # bytes that are read at most between two calls: more than caches hold
BANDWIDTH = 5e9  # bytes a second that the slowest memory of a machine gives, about
Clock = Callable[[], float]


def measure_operators(
    cache: Cache,
    structures: Mapping[str, Structure],
    shape: tuple[int, ...],
    *,
    indices: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    between: int = 0,
    clock: Clock | None = None,
) -> dict[str, float]:
    """Return the ms that a map of each structure takes for an input of `shape`, and how uncertain that is as "noise".

    structures: one of them is called "present"; the others are told by the median over rounds of their ratio to it, in one
    interleaved run, so that a slow spell of the machine does not favour any. Maps get random numbers. indices: the input holds
    integers below this, not numbers. between: bytes that the rest of the model reads between two calls, rounded to a power of
    the root of two. clock: seconds, that of `clock_for` without it. noise: the largest of the ratios' relative errors (two
    standard ones) and of how far a second copy of the present map is from the first. Found in the cache by structures, shape,
    dtype, device, threads and torch version.
    """
    device = torch.device(device)
    between = bucket(between)
    key = f"{digest('operators-3', structures, shape, indices, dtype, between, *place(device))}-times"
    stored = cache.get(key)
    if stored is None:
        x = _input(shape, indices, dtype)
        found = timed(structures, x, dtype, device, clock or clock_for(device), between)
        stored = {name: torch.tensor([ms], dtype=torch.float64) for name, ms in found.items()}
        cache.put(key, stored)
    return {name: float(ms) for name, ms in stored.items()}


def timed(
    structures: Mapping[str, Structure],
    x: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    between: int = 0,
) -> dict[str, float]:
    """Time the maps on x now, in ms. Slow ones get fewer rounds, a noisy machine gets more.

    The shape of x is that of the model: a gather along the last of three dimensions is not the one along two.
    """
    generator = torch.Generator().manual_seed(0)
    maps = {name: random_map(structure, dtype, device, generator) for name, structure in structures.items()}
    maps[AGAIN] = random_map(structures[PRESENT], dtype, device, generator)
    x = x.to(device)
    with torch.inference_mode():
        calls = {name: _call(made, x, device) for name, made in maps.items()}
        trial = measure_latency(calls, rounds=2, warmup=1, clock=clock)
        weight = sum(parameter.numel() * parameter.element_size() for parameter in maps[PRESENT].parameters())
        matters = weight / BANDWIDTH > WANTED * trial[PRESENT].median
        before = {name: _before(call, x, device, between) for name, call in calls.items()} if matters else None
        begun = clock()
        measure_latency(calls, rounds=1, warmup=0, clock=clock, before=before)
        rounds = min(max(math.ceil(SECONDS / max(clock() - begun, 1e-9)), ROUNDS[0]), ROUNDS[1])
        found = measure_latency(calls, rounds=rounds, warmup=1, clock=clock, before=before)
        for _ in range(PATIENCE - 1):
            if noise_of(found) <= WANTED:
                break
            found = joined(found, measure_latency(calls, rounds=rounds, warmup=0, clock=clock, before=before))
    present = found[PRESENT]
    times = {name: 1e3 * present.median * ratio_to(present, found[name]).value for name in structures}
    return times | {NOISE: noise_of(found)}


def noise_of(found: Mapping[str, Latency]) -> float:
    """Return how uncertain the ratios of a table are, relative to themselves."""
    present, again = found[PRESENT], ratio_to(found[PRESENT], found[AGAIN])
    ratios = [ratio_to(present, times) for name, times in found.items() if name != PRESENT]
    return max(abs(again.value - 1), *(ratio.error / ratio.value for ratio in ratios))


def bucket(size: int) -> int:
    """Return the bytes that are read between two calls: a power of the root of two, so that models of like size share tables.

    Less than a megabyte moves nothing out of a cache that matters.
    """
    return 0 if size < 2**20 else min(int(2 ** (round(2 * math.log2(size)) / 2)), LARGEST)


def reader(size: int, device: torch.device) -> Callable[[], object]:
    """Return what reads as many bytes of memory; they have been written, since memory that never was has a single page."""
    return torch.ones(size // 4, device=device).sum


def _before(call: Callable[[], object], x: Tensor, device: torch.device, between: int) -> Callable[[], object]:
    """Return what leaves the caches as a run of the model does: the map's weights, the rest of the model, then the input."""
    rest = reader(between, device)

    def before() -> None:
        call()
        rest()
        x.sum()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    return before


def _input(shape: tuple[int, ...], indices: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if indices:
        return torch.randint(indices, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device: of one thread on the CPU the time that it computes, else the wall's.

    What other processes take from one thread is no time of the operator, and on a busy machine it is most of the time of
    one that takes longer than a slice of the scheduler.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def random_map(structure: Structure, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> LinearMap:
    """Return a map of a structure with ordinary numbers: uninitialised memory may hold denormal ones, which are slow."""
    made = restore(structure)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for index in made.buffers():
            index.copy_(torch.randperm(index.numel(), generator=generator))
        for part in made.modules():
            if isinstance(part, Sparse):  # a mask has as many ones as there are numbers
                scores = torch.rand(part.shape, generator=generator)
                support = strongest(scores, part.kind.pattern, (part.count + 0.5) / scores.numel())
                part.support.copy_(part.kind.encode(support)[0])
    return made.to(dtype).to(device).requires_grad_(False).eval()


def place(device: torch.device) -> tuple[object, ...]:
    """Return what decides how long an operator takes, beside the operator: the device, its threads, torch."""
    if device.type == "cpu":
        return ("cpu", processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__)
    name = torch.get_device_module(device).get_device_name(device)
    return (device.type, name, torch.__version__)


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _call(made: LinearMap, x: Tensor, device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return lambda: made(x)

    def call() -> None:
        made(x)
        torch.get_device_module(device).synchronize(device)

    return call
