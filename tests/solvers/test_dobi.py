"""Dobi-SVD's decomposition: the outputs' own principal directions, the least output error, and everything at full rank."""

import pytest
import torch
from hypothesis import given, settings
from solver_cases import EPS, SHAPES, mean_square, moments_of, product, randn, ranks_of, samples, seeds, shapes, solved, spaced
from torch import Tensor

from lrc.solvers import dobi, whitened
from lrc.solvers.ladder import FLOOR


def rounding(W: Tensor, X: Tensor) -> float:
    """What rounding may add to a mean squared error of outputs, and the floor under small eigenvalues."""
    return (64 * (sum(W.shape) + len(X)) * EPS + FLOOR) * float(W.square().sum() * X.square().sum(1).mean())


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_every_truncation_projects_the_outputs_on_their_leading_directions(shape: tuple[int, int], seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    V = torch.linalg.svd(X @ W.T, full_matrices=False)[2].T
    terms = solved(dobi, W, moments_of(X))
    for rank in ranks_of(terms):
        wanted = X @ W.T @ V[:, :rank] @ V[:, :rank].T
        assert abs(mean_square(X @ product(terms, rank).T - X @ W.T) - mean_square(wanted - X @ W.T)) <= rounding(W, X)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_its_loss_is_that_of_whitened_at_every_rank(shape: tuple[int, int], seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    ours = solved(dobi, W, moments_of(X))
    theirs = solved(whitened, W, moments_of(X), center=False)
    assert ours.unit == theirs.unit
    assert float((ours.losses() - theirs.losses()).abs().max()) <= rounding(W, X)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_whitened_where_the_truncation_is_unique(shape: tuple[int, int]) -> None:
    W, X = spaced(*shape, seed=1), samples(shape[1], 2)
    ours, theirs = solved(dobi, W, moments_of(X)), solved(whitened, W, moments_of(X), center=False)
    for rank in ranks_of(ours):
        assert float((product(ours, rank) - product(theirs, rank)).abs().max()) <= 1e-8 * float(W.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_term_together_is_the_weight_and_the_bias_stays(shape: tuple[int, int]) -> None:
    W, X, b = randn(*shape, seed=1), samples(shape[1], 2), randn(shape[0], seed=3)
    terms = solved(dobi, W, moments_of(X), b)
    assert float((product(terms, min(shape)) - W).abs().max()) <= 64 * sum(shape) * EPS * float(W.norm())
    assert torch.equal(terms.truncate(1, W.dtype).bias, b)
    assert float((terms.B.T @ terms.B - torch.eye(min(shape), dtype=W.dtype)).abs().max()) <= 64 * sum(shape) * EPS
