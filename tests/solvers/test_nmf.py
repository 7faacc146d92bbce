"""NMF and semi-NMF: factors without negative entries, errors that never rise, and none below that of the SVD."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from solver_cases import EPS, F64, SHAPES, product, randn, seeds, shapes, solved, weight_of, weights
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers import Moments, nmf, snmf
from lrc.solvers.nmf import TINY
from lrc.spec.registry import Rule

both = pytest.mark.parametrize("rule", [snmf, nmf], ids=["snmf", "nmf"])
Solver = Rule[Any, Any]
ITERATIONS = (1, 2, 3, 5, 10, 40)


def weight_for(rule: Solver, shape: tuple[int, int], seed: int, kind: str = "full") -> Tensor:
    """A weight that the solver takes: of both signs for semi-NMF, and without negative entries for NMF."""
    W = weight_of(shape, seed, kind)
    return W if rule is snmf else W.abs()


def error(W: Tensor, approximation: Tensor) -> float:
    return float((W - approximation).norm())


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, kind=weights, seed=seeds, data=st.data())
def test_factors_have_no_negative_entries_and_the_error_is_that_of_the_svd_or_more(
    rule: Solver, shape: tuple[int, int], kind: str, seed: int, data: st.DataObject
) -> None:
    W = weight_for(rule, shape, seed, kind)
    rank = data.draw(st.integers(1, min(shape)))
    terms = solved(rule, W, rank=rank)
    assert terms.B.shape == (shape[0], rank)
    assert terms.A.shape == (rank, shape[1])
    assert float(terms.B.min()) >= 0
    assert rule is snmf or float(terms.A.min()) >= 0
    best = float(torch.linalg.svdvals(W)[rank:].norm())
    assert error(W, product(terms, rank)) >= best - 8 * max(shape) * EPS * float(W.norm())


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, kind=weights, seed=seeds, data=st.data())
def test_the_error_never_rises_from_one_update_to_the_next(
    rule: Solver, shape: tuple[int, int], kind: str, seed: int, data: st.DataObject
) -> None:
    W = weight_for(rule, shape, seed, kind)
    rank = data.draw(st.integers(1, min(shape)))
    errors = [float(W.norm())]
    errors += [error(W, product(solved(rule, W, rank=rank, num_iter=n), rank)) for n in ITERATIONS]
    # what is added to divisors shifts a factor by that part of itself, times the worst of the least squares
    tolerance = (TINY * sum(shape) * max(ITERATIONS)) * float(W.norm())
    assert all(later <= earlier + tolerance for earlier, later in pairwise(errors))


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, kind=weights, seed=seeds, data=st.data())
def test_the_loss_at_the_rank_asked_for_and_at_rank_zero_is_the_measured_one(
    rule: Solver, shape: tuple[int, int], kind: str, seed: int, data: st.DataObject
) -> None:
    W = weight_for(rule, shape, seed, kind)
    rank = data.draw(st.integers(1, min(shape)))
    terms = solved(rule, W, rank=rank)
    losses, squares = terms.losses(), float(W.square().sum())
    tolerance = (64 * sum(shape) * EPS + 16 * TINY * sum(shape)) * squares
    assert losses.shape == (rank + 1,)
    assert terms.unit == "squared weight error"
    assert abs(float(losses[rank]) - error(W, product(terms, rank)) ** 2) <= tolerance
    assert abs(float(losses[0]) - squares) <= tolerance
    assert (losses[1:] <= losses[:-1]).all()
    assert (terms.S[1:] <= terms.S[:-1]).all()


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_the_free_factor_of_snmf_is_the_least_squares_of_the_other(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    W = randn(*shape, seed=seed)
    rank = data.draw(st.integers(1, min(shape)))
    terms = solved(snmf, W, rank=rank)
    best = terms.B @ torch.linalg.pinv(terms.B) @ W
    condition = float(torch.linalg.cond(terms.B))
    if condition < 1e4:  # beyond, the square of the condition takes the digits
        tolerance = 64 * sum(shape) * EPS * condition**2 * float(W.norm())
        assert error(best, product(terms, rank)) <= tolerance


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 8), (5, 5)])
def test_snmf_of_full_rank_gives_back_a_weight_that_is_no_taller_than_wide(shape: tuple[int, int]) -> None:
    W = randn(*shape, seed=4)
    terms = solved(snmf, W)
    condition = float(torch.linalg.cond(terms.B))
    assert condition < 1e4
    assert error(W, product(terms, shape[0])) <= 64 * sum(shape) * EPS * condition**2 * float(W.norm())


@both
def test_many_updates_find_factors_that_are_there(rule: Solver) -> None:
    B, A = randn(8, 2, seed=0).abs(), randn(2, 6, seed=1)
    W = B @ (A if rule is snmf else A.abs())
    few, many = (error(W, product(solved(rule, W, rank=2, num_iter=n), 2)) for n in (10, 5000))
    assert many < few / 4
    assert many <= 0.01 * float(W.norm())


@both
@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_the_weight_is_that_of_the_product_and_changes_nothing_else(rule: Solver, unit: float) -> None:
    W = weight_for(rule, (6, 4), 3)
    power = 2.0 ** round(torch.tensor(unit).log2().item())  # so that nothing is rounded
    plain, scaled = solved(rule, W, rank=2), solved(rule, W * power, rank=2)
    assert torch.allclose(product(scaled, 2), product(plain, 2) * power, rtol=64 * EPS, atol=0)


@both
def test_a_seed_gives_the_same_factors_and_another_one_others(rule: Solver) -> None:
    W = weight_for(rule, (6, 4), 3)
    made = [rule(W, None, Moments(), 2, rule.options(), torch.Generator().manual_seed(seed)).B for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["deficient", "zero"])
def test_weights_that_lack_rank_give_finite_factors(rule: Solver, shape: tuple[int, int], kind: str) -> None:
    terms = solved(rule, weight_for(rule, shape, 3, kind), num_iter=50)
    assert torch.isfinite(terms.B).all()
    assert torch.isfinite(terms.A).all()
    assert torch.isfinite(terms.losses()).all()
    if kind == "zero":
        assert not product(terms, min(shape)).any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_a_low_precision_keeps_the_sign(rule: Solver, dtype: torch.dtype) -> None:
    W = weight_for(rule, (6, 4), 3).to(dtype)
    b = randn(6, seed=1)
    terms = solved(rule, W, bias=b, rank=2)
    assert terms.B.dtype == terms.A.dtype == torch.float32
    B, A, bias = terms.truncate(2, dtype)
    assert B.dtype == A.dtype == dtype
    assert float(B.min()) >= 0
    assert rule is snmf or float(A.min()) >= 0
    assert bias is not None
    assert torch.equal(bias, b.to(dtype))


@both
def test_the_two_sides_of_a_term_have_equal_norms_and_the_largest_comes_first(rule: Solver) -> None:
    terms = solved(rule, weight_for(rule, (8, 6), 3), rank=4)
    assert torch.allclose(terms.B.norm(dim=0), terms.A.norm(dim=1), rtol=1e-12, atol=0)
    norms = terms.B.norm(dim=0) * terms.A.norm(dim=1)
    assert (norms[1:] <= norms[:-1] * (1 + 8 * EPS)).all()


def test_their_ranks_are_not_nested_and_ten_updates_are_the_default() -> None:
    assert not snmf.options.nested
    assert not nmf.options.nested
    assert snmf.options().num_iter == nmf.options().num_iter == 10
    W = randn(8, 6, seed=3)
    assert error(product(solved(snmf, W, rank=4), 2), product(solved(snmf, W, rank=2), 2)) > 0.01


# What is refused.


def test_nmf_refuses_a_weight_with_negative_entries_and_names_the_solver_that_takes_it() -> None:
    W = randn(5, 4, seed=0).abs()
    W[2, 3] = -1e-30
    wanted = r"weight: expected no negative entry, got 1 negative of 20 values. Choose the solver `snmf`"
    with pytest.raises(SolverError, match=wanted):
        solved(nmf, W)
    assert torch.isfinite(solved(snmf, W).B).all()


@both
@pytest.mark.parametrize("times", [0, -1, 2.5])
def test_a_count_of_updates_that_is_none_is_refused(rule: Solver, times: Any) -> None:
    with pytest.raises(ValidationError, match="num_iter"):
        rule.options(num_iter=times)


def test_the_dtype_of_the_work_is_float64() -> None:
    assert solved(snmf, randn(5, 4, seed=0), rank=2).B.dtype == F64
