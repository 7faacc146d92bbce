"""Truncated SVD of the weight alone: the Eckart-Young bound, by two ways."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    EPS,
    F64,
    SHAPES,
    product,
    product_error,
    randn,
    ranks_of,
    seeds,
    shapes,
    solved,
    spaced,
    weight_of,
    weights,
)

from lrc.solvers import gram, svd
from lrc.spec.registry import Rule

both = pytest.mark.parametrize("rule", [svd, gram], ids=["svd", "gram"])
Solver = Rule[Any, Any]


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, kind=weights, seed=seeds)
def test_every_truncation_reaches_the_eckart_young_bound(rule: Solver, shape: tuple[int, int], kind: str, seed: int) -> None:
    W = weight_of(shape, seed, kind)
    terms = solved(rule, W)
    S = torch.linalg.svdvals(W)
    tolerance = 8 * max(shape) * EPS * float(torch.linalg.matrix_norm(W, 2))
    assert terms.S.shape == S.shape
    assert terms.unit == "squared weight error"
    for rank in ranks_of(terms):
        best = float(S[rank:].norm())
        assert float((W - product(terms, rank)).norm()) <= best + tolerance
        assert abs(float(terms.losses()[rank]) - best**2) <= 32 * max(shape) * EPS * float(W.square().sum())


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, kind=weights, seed=seeds)
def test_the_promised_loss_is_the_measured_one(rule: Solver, shape: tuple[int, int], kind: str, seed: int) -> None:
    W = weight_of(shape, seed, kind)
    terms = solved(rule, W)
    losses = terms.losses()
    tolerance = 32 * max(shape) * EPS * float(W.square().sum())
    assert losses.dtype == F64
    assert (losses[1:] <= losses[:-1]).all()
    assert (terms.S[1:] <= terms.S[:-1]).all()
    for rank in ranks_of(terms):
        assert abs(float((W - product(terms, rank)).square().sum()) - float(losses[rank])) <= tolerance


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds)
def test_products_are_those_of_torch(rule: Solver, shape: tuple[int, int], seed: int) -> None:
    W = spaced(*shape, seed)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    terms = solved(rule, W)
    for rank in ranks_of(terms):
        expected = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert float((product(terms, rank) - expected).norm()) <= product_error(S, rank, max(shape), float(S[0]))


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_sides_of_a_term_have_equal_norms(rule: Solver, shape: tuple[int, int]) -> None:
    terms = solved(rule, spaced(*shape, 1))
    assert torch.allclose(terms.B.norm(dim=0), terms.A.norm(dim=1), rtol=64 * EPS * max(shape), atol=0)


@both
def test_terms_come_in_descending_order_even_where_they_are_rounding(rule: Solver) -> None:
    for seed in range(20):
        S = solved(rule, weight_of((8, 7), seed, "deficient")).S
        assert (S[1:] <= S[:-1]).all()
        assert (S >= 0).all()


@both
@pytest.mark.parametrize("kind", ["deficient", "zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_lack_rank_give_finite_terms(rule: Solver, shape: tuple[int, int], kind: str) -> None:
    terms = solved(rule, weight_of(shape, 3, kind))
    assert torch.isfinite(terms.B).all()
    assert torch.isfinite(terms.A).all()
    assert torch.isfinite(terms.losses()).all()


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_terms_that_are_not_stored_still_count_in_the_loss(
    rule: Solver, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    W = randn(*shape, seed=seed)
    rank = data.draw(st.integers(1, min(shape)))
    some, every = solved(rule, W, rank=rank), solved(rule, W)
    assert some.B.shape == (shape[0], rank)
    assert some.A.shape == (rank, shape[1])
    assert torch.allclose(some.losses(), every.losses()[: rank + 1], rtol=64 * EPS, atol=64 * EPS * float(W.square().sum()))


@both
def test_the_bias_is_handed_on_and_none_is_added(rule: Solver) -> None:
    W, b = randn(4, 6, seed=0), randn(4, seed=1)
    assert solved(rule, W).truncate(2, F64).bias is None
    bias = solved(rule, W, bias=b).truncate(2, torch.float32).bias
    assert bias is not None
    assert torch.equal(bias, b.float())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_weights_are_decomposed_in_float64_and_rounded_once(rule: Solver, dtype: torch.dtype) -> None:
    W = spaced(6, 4, 0).to(dtype)
    terms = solved(rule, W)
    assert terms.B.dtype == terms.A.dtype == torch.float32
    S = torch.linalg.svdvals(W.double())
    assert torch.allclose(terms.S.double(), S, rtol=1e-9, atol=0)
    B, A, _ = terms.truncate(3, dtype)
    assert B.dtype == A.dtype == dtype
    assert B.is_contiguous()
    assert A.is_contiguous()
    best, eps = float(S[3:].norm()), torch.finfo(dtype).eps
    assert float((W.double() - B.double() @ A.double()).norm()) <= best + 2 * 3 * eps * float(S.norm())


def test_a_large_weight_does_not_overflow_half_precision_factors() -> None:
    W = 3e4 * spaced(6, 4, 0)
    B, A, _ = solved(svd, W.half()).truncate(4, torch.float16)
    assert torch.isfinite(B).all()
    assert torch.isfinite(A).all()


def test_gram_measures_losses_where_its_vectors_are_blind() -> None:
    S = torch.tensor([1.0, 1e-3, 1e-9, 1e-10], dtype=F64)
    W = torch.linalg.qr(randn(6, 4, seed=0))[0] * S @ torch.linalg.qr(randn(4, 4, seed=1))[0]
    terms = solved(gram, W)
    for rank in ranks_of(terms):
        measured = float((W - product(terms, rank)).norm())
        assert abs(float(terms.losses()[rank]) ** 0.5 - measured) <= 16 * EPS
        assert measured <= max(2e-9, 2 * float(S[rank:].norm()))
