"""A square root of a second moment that never fails: Cholesky, then eigh with a floor, then the identity.

Every solver that weighs errors by data needs L with L Lᵀ = C, as two operations: X L and X L⁻¹. Real C are singular (fewer
tokens than features, dead inputs), so each rung of the ladder says in a note what it had to do.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FLOOR = 1e-10  # of the largest eigenvalue: its root, 1e-5, still leaves 11 digits in float64
PIVOT = 1e-12  # smallest squared diagonal of a Cholesky factor, of the largest, that is taken for more than rounding


@dataclass(frozen=True)
class Root:
    """L of shape (n, n) with L Lᵀ = C (damped), float64.

    matrix: L itself. inverse: L⁻¹ where it is known in closed form, or None for a lower triangular L.
    weight: 1.0, or 0.0 where C is zero: L is then the identity, and no error costs anything. notes: what was done to C.
    """

    matrix: Tensor
    inverse: Tensor | None = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()

    def apply(self, X: Tensor) -> Tensor:
        """Return X L, X of shape (rows, n)."""
        return X @ self.matrix

    def solve(self, X: Tensor) -> Tensor:
        """Return X L⁻¹, X of shape (rows, n): a triangular solve, never an explicit inverse of a triangle."""
        if self.inverse is not None:
            return X @ self.inverse
        solved: Tensor = torch.linalg.solve_triangular(self.matrix, X, upper=False, left=False)
        return solved

    def divide(self, X: Tensor) -> Tensor:
        """Return X C⁻¹ = X L⁻ᵀ L⁻¹, X of shape (rows, n)."""
        if self.inverse is not None:
            return X @ self.inverse.T @ self.inverse
        return torch.cholesky_solve(X.T, self.matrix).T


class DiagonalRoot(Root):
    """The root of a diagonal matrix; `matrix` is its diagonal, shape (n,)."""

    def apply(self, X: Tensor) -> Tensor:
        """Return X L, X of shape (rows, n)."""
        return X * self.matrix

    def solve(self, X: Tensor) -> Tensor:
        """Return X L⁻¹, X of shape (rows, n)."""
        return X / self.matrix

    def divide(self, X: Tensor) -> Tensor:
        """Return X C⁻¹, X of shape (rows, n)."""
        return X / self.matrix.square()


def root(moment: Tensor, name: str, damping: float = 0.0, variant: Literal["cholesky", "eigh"] = "cholesky") -> Root:
    """Return the root of `moment + damping * mean(diag) I` by the first rung that holds.

    moment: symmetric positive semi-definite up to rounding, finite, shape (n, n), or its diagonal, (n,), where it has
    nothing else; computed in float64.
    name: what the notes call it. variant: `eigh` starts at the second rung.
    """
    if moment.ndim == 1:
        return _diagonal(moment.double(), name, damping)
    C = symmetric(moment)
    size = C.shape[0]
    level = float(C.diagonal().mean())
    if level <= 0 or not math.isfinite(1.0 / level):
        note = f"{name} is zero: calibration does not reach this layer, and its errors are not weighed"
        return Root(identity(size, C), identity(size, C), 0.0, (note,))
    C = C / level  # so that tiny and huge units neither under- nor overflow
    C.diagonal().add_(damping)
    found = _cholesky(C) if variant == "cholesky" else None
    if found is None:
        found = _floored(C, name)
    scale = math.sqrt(level)
    inverse = None if found.inverse is None else found.inverse / scale
    return Root(found.matrix * scale, inverse, found.weight, found.notes)


def _diagonal(moment: Tensor, name: str, damping: float) -> Root:
    level = float(moment.mean())
    if level <= 0 or not math.isfinite(1.0 / level):
        note = f"{name} is zero: calibration does not reach this layer, and its errors are not weighed"
        return DiagonalRoot(torch.ones_like(moment), None, 0.0, (note,))
    C = moment / level + damping
    floor = FLOOR * float(C.max())
    unseen = int((floor >= C).sum())
    notes = (f"{unseen} of {len(C)} rows were never read: floor {FLOOR:g}",) if unseen else ()
    return DiagonalRoot((C.clamp(min=floor) * level).sqrt(), notes=notes)


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part in float64."""
    double = matrix.double()
    return (double + double.T) / 2


def identity(size: int, like: Tensor) -> Tensor:
    """Return the identity of `size` in the dtype and on the device of `like`."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _cholesky(C: Tensor) -> Root | None:
    L, info = torch.linalg.cholesky_ex(C)
    if int(info) != 0:
        return None
    pivots = L.diagonal().square()
    return Root(L) if bool(pivots.min() > PIVOT * pivots.max()) else None


def _floored(C: Tensor, name: str) -> Root:
    """Q diag(sqrt(max(e, floor))): Wang et al. (2025), SVD-LLM v2, with a floor in place of dropped directions."""
    size = C.shape[0]
    try:
        e, Q = torch.linalg.eigh(C)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        note = f"{name} has no eigenvalues that converge: the identity takes its place"
        return Root(identity(size, C), identity(size, C), notes=(note,))
    floor = FLOOR * float(e[-1])
    kept = int((e > floor).sum())
    notes = () if kept == size else (f"{name} is singular (rank {kept} of {size}): eigh with floor {FLOOR:g}",)
    roots = e.clamp(min=floor).sqrt()
    return Root(Q * roots, (Q / roots).T.contiguous(), notes=notes)
