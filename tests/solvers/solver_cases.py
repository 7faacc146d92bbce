"""Weights, samples and their moments for tests of solvers, and the losses written out sample by sample."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lrc.solvers import Decomposition, Moments
from lrc.solvers.ladder import FLOOR
from lrc.spec.registry import Rule

F64 = torch.float64
EPS = torch.finfo(F64).eps
SHAPES = [(1, 1), (1, 6), (6, 1), (3, 8), (8, 3), (5, 5)]
WEIGHTS = ["full", "deficient", "zero"]
INPUTS = ["full", "few", "dead", "zero"]

shapes = st.sampled_from(SHAPES)
DAMPING = 1e-2  # of kfac's inputs, by default

seeds = st.integers(0, 2**16)
weights = st.sampled_from(WEIGHTS)
inputs = st.sampled_from(INPUTS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=generator(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(randn(size, size, seed=seed))[0]
    return Q


def weight_of(shape: tuple[int, int], seed: int, kind: str = "full") -> Tensor:
    """A weight of full rank, of half the rank, or zero."""
    m, n = shape
    if kind == "zero":
        return torch.zeros(m, n, dtype=F64)
    if kind == "deficient":
        rank = max(1, min(m, n) // 2)
        return randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1)
    return randn(m, n, seed=seed)


def spaced(m: int, n: int, seed: int) -> Tensor:
    """A weight with the singular values 1, 1/2, 1/4, …, so that every truncation of it is unique."""
    k = min(m, n)
    S = 0.5 ** torch.arange(k, dtype=F64)
    return orthogonal(m, seed)[:, :k] * S @ orthogonal(n, seed + 1)[:k]


def samples(features: int, seed: int, kind: str = "full", tokens: int = 40) -> Tensor:
    """Inputs (tokens, features) whose mean is not zero: many, fewer than features, with dead features, or all zero."""
    if kind == "few":
        tokens = max(1, features // 2)
    X = randn(tokens, features, seed=seed + 2) @ randn(features, features, seed=seed + 3) + 2 * randn(features, seed=seed + 4)
    if kind == "dead":
        X[:, 1::2] = 0
    return X * 0 if kind == "zero" else X


def moments_of(X: Tensor, gradients: Tensor | None = None, dense: Tensor | None = None) -> Moments:
    """The moments of inputs (tokens, features); dense: the inputs of the dense model where X are the compressed one's."""
    tokens = X.shape[0]
    return Moments(
        gram=X.T @ X / tokens,
        mean=X.mean(0),
        fisher=None if gradients is None else gradients.T @ gradients / gradients.shape[0],
        cross=None if dense is None else dense.T @ X / tokens,
        dense_mean=None if dense is None else dense.mean(0),
        tokens=tokens,
    )


def with_samples(moments: Moments, X: Tensor, gradients: Tensor) -> Moments:
    """Add what is measured sample by sample, where every token is a sample of its own."""
    fisher = gradients.square().T @ X.square() / len(X)
    return replace(moments, magnitudes=X.abs().mean(0), weight_fisher=fisher)


def solved(
    rule: Rule[Any, Any], weight: Tensor, moments: Moments | None = None, bias: Tensor | None = None, rank: int = 0,
    **options: Any,
) -> Decomposition:  # fmt: skip
    """Call a solver for all terms, or for the first `rank` ones."""
    made = rule(weight, bias, moments or Moments(), rank or min(weight.shape), rule.options(**options), generator(0))
    assert isinstance(made, Decomposition)
    return made


def ranks_of(terms: Decomposition) -> range:
    return range(len(terms.S) + 1)


def product(terms: Decomposition, rank: int) -> Tensor:
    B, A, _ = terms.truncate(rank, F64)
    return B @ A


def outputs(terms: Decomposition, rank: int, X: Tensor) -> Tensor:
    """What the rank-`rank` layer gives for the inputs."""
    B, A, bias = terms.truncate(rank, F64)
    return X @ (B @ A).T + (0 if bias is None else bias)


def mean_square(Y: Tensor) -> float:
    """The mean over samples of the squared norm."""
    return float(Y.square().sum(1).mean())


def product_error(S: Tensor, rank: int, size: int, norm: float) -> float:
    """How far two computations of one truncation may differ: rounding over the gap between kept and dropped directions."""
    if rank in (0, len(S)):
        return 64 * size * EPS * norm
    squares = S.double().square()
    gap = float(squares[rank - 1] - squares[rank])
    return float("inf") if gap <= 0 else 64 * size * EPS * norm * float(squares[0]) / gap


def gradients(features: int, seed: int, kind: str = "full") -> Tensor:
    return 0.1 * samples(features, seed + 50, kind)


def damped(moment: Tensor | None, share: float) -> Tensor:
    assert moment is not None
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=F64)


def second_order(dW: Tensor, C: Tensor, G: Tensor) -> float:
    """1/2 tr(G dW C dW^T)."""
    return 0.5 * float((G @ dW @ C).mul(dW).sum())


def rounding(W: Tensor, C: Tensor, G: Tensor) -> float:
    """What rounding and the floor under small eigenvalues may add to a predicted loss, for G of modest condition."""
    condition = float(torch.linalg.cond(G)) ** 0.5
    return (64 * sum(W.shape) * EPS * condition + FLOOR) * float(W.square().sum() * C.trace() * G.trace())
