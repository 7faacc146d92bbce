"""Pivoted LU with the diagonal taken out: the identities that the adapter stands on."""

import pytest
import torch
from torch import Tensor

from lrc.solvers.ldu import ldu

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)]


def matrix(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m * n))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_all_terms_give_the_weight(m: int, n: int) -> None:
    W = matrix(m, n)
    found = ldu(W, min(m, n))
    assert torch.allclose(found.product(), W, rtol=0, atol=1e-13)
    assert found.unit


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_factors_are_triangular_with_unit_diagonals_and_small_multipliers(m: int, n: int) -> None:
    for rank in range(1, min(m, n) + 1):
        found = ldu(matrix(m, n), rank)
        assert found.L.shape == (m, rank)
        assert found.U.shape == (rank, n)
        assert torch.equal(found.L[:rank].triu(), torch.eye(rank, dtype=torch.float64))
        assert torch.allclose(found.U[:, :rank].tril(), torch.eye(rank, dtype=torch.float64))
        assert found.L.abs().max() <= 1
        assert sorted(found.order.tolist()) == list(range(m))


def test_the_first_rows_and_columns_are_exact_and_the_product_is_no_best_approximation() -> None:
    W, rank = matrix(8, 6), 3
    found = ldu(W, rank)
    made = found.product()
    assert torch.allclose(made[:, :rank], W[:, :rank], rtol=0, atol=1e-13)
    assert torch.allclose(made[found.order[:rank]], W[found.order[:rank]], rtol=0, atol=1e-13)
    assert torch.linalg.norm(W - made) > torch.linalg.svdvals(W)[rank:].norm()


@pytest.mark.parametrize("m", [4, 6, 9])
def test_a_weight_that_lacks_rank_keeps_the_rows_of_its_tiny_pivots(m: int) -> None:
    W = matrix(m, 2) @ matrix(2, 6)
    found = ldu(W, 4)
    assert not found.unit
    assert found.d[2:].tolist() == [1.0, 1.0]
    assert found.U.isfinite().all()
    assert torch.allclose(found.product(), W, rtol=0, atol=1e-12)
    assert ldu(torch.zeros(3, 5), 2).product().abs().max() == 0


def test_scipy_finds_the_same_decomposition() -> None:
    import scipy.linalg

    W = matrix(7, 5)
    P, L, U = (torch.from_numpy(part) for part in scipy.linalg.lu(W.numpy()))
    found = ldu(W, 5)
    assert torch.allclose(found.L, L)
    assert torch.allclose(found.d, U.diagonal())
    assert torch.equal(P.argmax(0), found.order)
