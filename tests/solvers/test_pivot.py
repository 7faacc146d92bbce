"""The pivoted form of a product: the same matrix in r(m + n - r) numbers, with bounded Z, or a refusal with the reason."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EPS, F64, SHAPES, orthogonal, randn, seeds, shapes
from torch import Tensor

from lrc.maps import Pivoted
from lrc.solvers import Pivot, Refusal
from lrc.solvers import pivot as pivot_of

STRONG = 2.0  # what a strong rank-revealing factorisation bounds |Z| by (methods/kfac_pivoted.md, invariant 5)
sides = st.sampled_from(["out", "in"])


def made(B: Tensor, A: Tensor, side: str = "out", dtype: torch.dtype | None = None) -> Pivot:
    found = pivot_of(B, A, side, dtype=dtype)  # type: ignore[arg-type]
    assert isinstance(found, Pivot), found
    return found


def dense(found: Pivot) -> Tensor:
    """[P; Z P] (or its transpose) with its rows put back in their own order."""
    P, Z = (found.P, found.Z) if found.side == "out" else (found.P.T, found.Z)
    stacked = torch.cat([P, Z @ P])
    order = found.index if found.side == "out" else found.index.argsort()
    return stacked[order] if found.side == "out" else stacked[order].T


def tolerance(B: Tensor, A: Tensor, dtype: torch.dtype) -> float:
    """Each entry of Z P is a sum of r products of |Z| <= 2 and an entry of P, and both are rounded to `dtype`."""
    return 8 * sum(B.shape) * torch.finfo(dtype).eps * STRONG * float(B.norm() * A.norm())


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, side=sides, dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data())
def test_the_pivoted_form_is_the_product(
    shape: tuple[int, int], seed: int, side: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    m, n = shape
    rank = data.draw(st.integers(1, min(m, n)))
    B, A = randn(m, rank, seed=seed), randn(rank, n, seed=seed + 1)
    found = made(B, A, side, dtype)
    assert found.P.dtype == found.Z.dtype == dtype
    assert float((dense(found).double() - B @ A).norm()) <= tolerance(B, A, dtype)
    assert found.Z.numel() == 0 or float(found.Z.abs().max()) <= STRONG * (1 + torch.finfo(dtype).eps)
    assert found.P.numel() + found.Z.numel() == rank * (m + n - rank)
    rows = m if side == "out" else n
    assert found.index.sort()[0].tolist() == list(range(rows))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, side=sides, data=st.data())
def test_as_a_map_it_does_what_the_product_does(shape: tuple[int, int], seed: int, side: str, data: st.DataObject) -> None:
    m, n = shape
    rank = data.draw(st.integers(1, min(m, n)))
    B, A, x = randn(m, rank, seed=seed), randn(rank, n, seed=seed + 1), randn(4, n, seed=seed + 2)
    found = made(B, A, side)
    layer = Pivoted(found.P, found.Z, found.index, found.side)
    assert float((layer(x) - x @ A.T @ B.T).detach().norm()) <= tolerance(B, A, F64) * float(x.norm())
    assert layer.cost().parameters == rank * (m + n - rank)
    assert layer.cost().bytes == 8 * rank * (m + n - rank) + 4 * (m if side == "out" else n)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_of_its_side_the_pivots_are_the_weight_in_another_order(shape: tuple[int, int], side: str) -> None:
    rank = min(shape)
    W = randn(*shape, seed=1)
    B, A = (torch.eye(rank, dtype=F64), W) if shape[0] == rank else (W, torch.eye(rank, dtype=F64))
    found = made(B, A, side)
    if (shape[0] if side == "out" else shape[1]) == rank:
        assert found.Z.shape == (0, rank)
        assert torch.equal(dense(found), W)
    assert float((dense(found) - W).norm()) <= tolerance(B, A, F64)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_rank_one_every_row_is_a_multiple_of_the_pivot(shape: tuple[int, int], side: str) -> None:
    B, A = randn(shape[0], 1, seed=1), randn(1, shape[1], seed=2)
    found = made(B, A, side)
    left = B[:, 0] if side == "out" else A[0]
    rows = found.index.argsort() if side == "out" else found.index
    assert torch.allclose(found.Z[:, 0], left[rows[1:]] / left[rows[0]], rtol=16 * EPS, atol=0)
    assert found.Z.numel() == 0 or float(found.Z.abs().max()) <= STRONG


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, side=sides, data=st.data())
def test_dependent_or_zero_columns_are_no_obstacle(shape: tuple[int, int], seed: int, side: str, data: st.DataObject) -> None:
    m, n = shape
    rank = data.draw(st.integers(1, min(m, n)))
    true = data.draw(st.integers(0, rank))
    mix = randn(rank, true, seed=seed + 2) @ randn(true, rank, seed=seed + 3)
    B, A = randn(m, rank, seed=seed) @ mix, mix @ randn(rank, n, seed=seed + 1)
    found = made(B, A, side)
    assert float((dense(found) - B @ A).norm()) <= tolerance(B, A, F64)
    assert found.Z.numel() == 0 or float(found.Z.abs().max()) <= STRONG


@settings(max_examples=20, deadline=None)
@given(shape=st.sampled_from([(8, 6), (6, 8), (7, 7)]), seed=seeds, decades=st.integers(0, 12), side=sides)
def test_badly_scaled_factors_lose_no_digits(shape: tuple[int, int], seed: int, decades: int, side: str) -> None:
    m, n = shape
    S = torch.logspace(0, -decades, 4, dtype=F64)
    B, A = orthogonal(m, seed)[:, :4] * S, orthogonal(n, seed + 1)[:4]
    found = made(B, A, side)
    assert float((dense(found) - B @ A).norm()) <= tolerance(B, A, F64)


def growing(rank: int) -> Tensor:
    """Rows that partial pivoting takes in their own order, though the last one is then about 2 ** (rank - 1) times them."""
    below = 0.999 * torch.ones(rank, rank, dtype=F64).tril(-1)
    return torch.cat([torch.eye(rank, dtype=F64) - below, -0.999 * torch.ones(1, rank, dtype=F64)])


@pytest.mark.parametrize("rank", [3, 8, 14])
def test_exchanges_bring_down_what_elimination_alone_lets_grow(rank: int) -> None:
    B, A = growing(rank), randn(rank, 20, seed=1)
    found = made(B, A)
    assert float(found.Z.abs().max()) <= STRONG
    assert float((dense(found) - B @ A).norm()) <= tolerance(B, A, F64)


def test_a_form_that_would_lose_digits_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("lrc.solvers.pivot"), "EXCHANGES", 0)
    found = pivot_of(growing(14), randn(14, 20, seed=1))
    assert isinstance(found, Refusal)
    assert found.reason == f"max |Z| = {0.999 * 1.999**13:.3g} is over 1000: the pivoted form would lose digits"


def test_more_rank_than_rows_and_numbers_that_are_not_finite_are_refused() -> None:
    assert pivot_of(randn(3, 5, seed=0), randn(5, 9, seed=1)) == Refusal("rank 5 is more than the 3 rows to choose from")
    assert isinstance(pivot_of(randn(3, 5, seed=0), randn(5, 9, seed=1), "in"), Pivot)
    B = randn(6, 2, seed=0)
    B[3, 1] = float("nan")
    assert isinstance(pivot_of(B, randn(2, 5, seed=1)), Refusal)


def test_the_dtype_of_the_factors_is_kept_unless_another_is_asked_for() -> None:
    B, A = randn(6, 2, seed=0).float(), randn(2, 5, seed=1).float()
    assert made(B, A).P.dtype == torch.float32
    half = made(B, A, dtype=torch.bfloat16)
    assert half.P.dtype == half.Z.dtype == torch.bfloat16
    assert half.index.dtype == torch.int64


def test_factors_that_are_trained_are_read_and_not_changed() -> None:
    B, A = torch.nn.Parameter(randn(6, 2, seed=0)), torch.nn.Parameter(randn(2, 5, seed=1))
    found = made(B, A)
    assert not found.P.requires_grad
    assert torch.equal(B, randn(6, 2, seed=0))
    assert torch.equal(A, randn(2, 5, seed=1))
