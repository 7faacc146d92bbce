"""Singular values of weights, computed once and cached by content."""

import torch
from torch import Tensor

from lrc.measure.cache import Cache, digest


def spectrum(weight: Tensor, cache: Cache | None = None) -> Tensor:
    """Return the singular values of a matrix, descending, float64, computed in float64."""
    key = f"{digest('spectrum-1', weight)}-spectrum"
    stored = None if cache is None else cache.get(key)
    if stored is not None:
        return stored["S"]
    S: Tensor = torch.linalg.svdvals(weight.detach().double())
    if cache is not None:
        cache.put(key, {"S": S})
    return S


def stable_rank(S: Tensor) -> float:
    """Return ||W||_F² / ||W||_2², a rank that does not jump: between 1 and the rank. 0 for a zero matrix."""
    top = float(S[0]) ** 2 if len(S) else 0.0
    return float(S.square().sum()) / top if top > 0 else 0.0
