"""Weighted and partly known matrices for tests of alternating least squares."""

import pytest
import torch
from solver_cases import F64, generator, orthogonal
from torch import Tensor

from lrc.solvers.alternating import Matrix
from lrc.solvers.elementwise import Elementwise
from lrc.solvers.entries import Entries

SHAPES = [(12, 7, 3), (7, 12, 3), (9, 1, 1), (1, 9, 1), (6, 6, 6), (30, 20, 4)]
kinds = pytest.mark.parametrize("kind", ["entries", "elementwise"])
lsqs = pytest.mark.parametrize("lsq", ["exact", "sketch_pcg"])


def made(kind: str, M: Tensor, Omega: Tensor) -> Matrix:
    return Entries.of(M, Omega) if kind == "entries" else Elementwise(M, Omega)


def rand(*size: int, seed: int) -> Tensor:
    return torch.rand(*size, dtype=F64, generator=generator(seed))


def mask_of(shape: tuple[int, int], share: float, seed: int) -> Tensor:
    return (rand(*shape, seed=seed) < share).double()


def uneven(shape: tuple[int, int], seed: int) -> Tensor:
    """Weights over four orders of magnitude."""
    return 10 ** (4 * rand(*shape, seed=seed) - 2)


def planted(m: int, n: int, S: list[float], seed: int) -> Tensor:
    return orthogonal(m, seed)[:, : len(S)] * torch.tensor(S, dtype=F64) @ orthogonal(n, seed + 1)[: len(S)]


def objective(M: Tensor, Omega: Tensor, U: Tensor, V: Tensor, ridge: float) -> float:
    return float((Omega * (M - U @ V.T).square()).sum() + ridge * (U.square().sum() + V.square().sum()))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] @ pair[1].T
