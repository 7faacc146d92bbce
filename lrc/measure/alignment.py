"""Which multiples of ranks a device computes with whole vectors, or whole tiles of its matrix units.

Source: NVIDIA, Matrix Multiplication Background User's Guide, "Tensor Core Requirements": sizes are multiples of 16 bytes, and
of 128 bytes on compute capability 8.0 and later. On a CPU the width of its vectors.
"""

import statistics
from collections.abc import Sequence

import torch

CPU = {"AVX512": 64, "AVX2": 32}  # bytes of a vector; all others (NEON, SSE) have 16
LEAST = 4  # steps that the middle layer's ranks have at least, so that a budget has something to choose from


def aligned(device: torch.device, dtype: torch.dtype, full_ranks: Sequence[int]) -> tuple[int, str]:
    """Return what ranks should be multiples of for layers of these full ranks, and why, in words."""
    size, what = vector(device)
    return step(size, what, dtype, full_ranks)


def vector(device: torch.device) -> tuple[int, str]:
    """Return the bytes that a device computes with at a time, and their name."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return tile(capability), f"tensor cores of compute capability {capability[0]}.{capability[1]}"
    name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return CPU.get(name, 16), f"vectors of {name}"


def tile(capability: tuple[int, int]) -> int:
    """Return the bytes that sizes are multiples of on tensor cores."""
    return 128 if capability >= (8, 0) else 16


def step(size: int, what: str, dtype: torch.dtype, full_ranks: Sequence[int]) -> tuple[int, str]:
    """Return how many numbers `size` bytes hold, halved while the middle one of all full ranks has fewer than LEAST steps."""
    whole = made = max(1, size // dtype.itemsize)
    middle = statistics.median_low(full_ranks) if full_ranks else made * LEAST
    while made > 1 and made * LEAST > middle:
        made //= 2
    reason = f"{size} bytes, {what}, hold {whole} numbers of {str(dtype).removeprefix('torch.')}"
    return made, reason if made == whole else f"{reason}, halved for layers of rank {middle}"
