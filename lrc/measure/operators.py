"""Times of maps on this device, by their structure alone: what a budget of latency looks up."""

import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lrc.maps import LinearMap, Structure, restore
from lrc.measure.cache import Cache, digest
from lrc.measure.latency import measure_latency, speedup

SECONDS = 1.5  # what the rounds of one table take, about
ROUNDS = (9, 60)
BASELINE = "present"
Clock = Callable[[], float]


def measure_operators(
    cache: Cache,
    structures: Mapping[str, Structure],
    shape: tuple[int, ...],
    *,
    indices: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, float]:
    """Return the ms that a map of each structure takes for an input of `shape`.

    structures: one of them is called "present"; the others are told by the median over rounds of their ratio to it, in one
    interleaved run, so that a slow spell of the machine does not favour any. Maps get random numbers. indices: the input holds
    integers below this, not numbers. clock: seconds, that of `clock_for` without it. Found in the cache by structures, shape,
    dtype, device, threads and torch version.
    """
    device = torch.device(device)
    key = f"{digest('operators-2', structures, shape, indices, dtype, *place(device))}-times"
    stored = cache.get(key)
    if stored is None:
        found = timed(structures, _input(shape, indices, dtype), dtype, device, clock or clock_for(device))
        stored = {name: torch.tensor([ms], dtype=torch.float64) for name, ms in found.items()}
        cache.put(key, stored)
    return {name: float(ms) for name, ms in stored.items()}


def timed(
    structures: Mapping[str, Structure], x: Tensor, dtype: torch.dtype, device: torch.device, clock: Clock
) -> dict[str, float]:
    """Time the maps on x now, in ms. Slow ones get fewer rounds.

    The shape of x is that of the model: a gather along the last of three dimensions is not the one along two.
    """
    generator = torch.Generator().manual_seed(0)
    maps = {name: random_map(structure, dtype, device, generator) for name, structure in structures.items()}
    x = x.to(device)
    with torch.inference_mode():
        calls = {name: _call(made, x, device) for name, made in maps.items()}
        edge = _call(random_map(structures[BASELINE], dtype, device, generator), x, device)
        calls = {"first": edge, **calls, "last": edge}  # rounds turn back there: the map at an edge would find its own cache
        trial = measure_latency(calls, rounds=3, warmup=2, clock=clock)
        one = sum(times.median for times in trial.values())
        rounds = min(max(math.ceil(SECONDS / max(one, 1e-9)), ROUNDS[0]), ROUNDS[1])
        found = measure_latency(calls, rounds=rounds, warmup=1, clock=clock)
    present = found[BASELINE]
    return {name: 1e3 * present.median / speedup(present, found[name]) for name in structures}


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
