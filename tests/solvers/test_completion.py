"""Alternating least squares: its fixed points against closed forms, what it recovers, and what it ignores."""

import math

import pytest
import torch
from completion_cases import SHAPES, kinds, lsqs, made, mask_of, planted, product, rand, relative, uneven
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EPS, F64, generator, randn, seeds

from lrc.solvers.alternating import alternate, balanced, masked_svd, scaled_svd, scales
from lrc.solvers.elementwise import Elementwise
from lrc.solvers.entries import Entries
from lrc.solvers.halfstep import Lsq


@settings(max_examples=15, deadline=None)
@given(case=st.sampled_from(SHAPES), seed=seeds)
def test_balancing_keeps_the_product_and_makes_both_sides_alike(case: tuple[int, int, int], seed: int) -> None:
    m, n, k = case
    U, V = 1e3 * randn(m, k, seed=seed), randn(n, k, seed=seed + 1)
    one, two = balanced(U, V)
    norm = float(torch.linalg.matrix_norm(U @ V.T, 2))
    assert float((one @ two.T - U @ V.T).norm()) <= 64 * max(m, n) * EPS * norm * k
    S = torch.linalg.svdvals(U @ V.T)[:k]
    for side in (one, two):
        assert torch.allclose(side.T @ side, torch.diag(S), rtol=0, atol=64 * max(m, n) * EPS * norm * k)


@kinds
@lsqs
def test_all_entries_alike_lead_to_the_truncated_svd_from_any_start(kind: str, lsq: Lsq) -> None:
    for m, n in ((40, 25), (25, 40)):
        M = planted(m, n, [0.5**i for i in range(25)], 3)
        U, S, Vh = torch.linalg.svd(M)
        fit = alternate(
            made(kind, M, torch.ones(m, n, dtype=F64)), randn(m, 4, seed=5), randn(n, 4, seed=6), generator(0), lsq=lsq,
            ridge=0, tolerance=0, sweeps=60,
        )  # fmt: skip
        assert relative(fit.U @ fit.V.T, U[:, :4] * S[:4] @ Vh[:4]) < 1e-8


@kinds
@lsqs
def test_weights_of_rank_one_lead_to_the_closed_form(kind: str, lsq: Lsq) -> None:
    for m, n in ((40, 25), (25, 40)):
        a, b = 0.1 + rand(m, seed=1), 0.1 + 5 * rand(n, seed=2)
        M = planted(m, n, [0.5**i for i in range(25)], 3) / (a.sqrt()[:, None] * b.sqrt())
        U, S, Vh = torch.linalg.svd(a.sqrt()[:, None] * M * b.sqrt())
        wanted = (U[:, :4] * S[:4] @ Vh[:4]) / (a.sqrt()[:, None] * b.sqrt())
        problem = made(kind, M, a[:, None] * b)
        fit = alternate(
            problem, randn(m, 4, seed=5), randn(n, 4, seed=6), generator(0), lsq=lsq, ridge=0, tolerance=0, sweeps=60
        )
        assert relative(fit.U @ fit.V.T, wanted) < 1e-8
        assert problem.is_rank_one(*scales(problem))
        assert relative(product(scaled_svd(Elementwise(M, a[:, None] * b), 4, generator(0))), wanted) < 1e-12


@kinds
def test_weights_that_are_not_of_rank_one_are_told_from_those_that_are(kind: str) -> None:
    Omega = torch.outer(1 + rand(6, seed=0), 1 + rand(5, seed=1))
    Omega[2, 3] *= 1.0001
    problem = made(kind, Omega, Omega)
    assert not problem.is_rank_one(*scales(problem))


@kinds
@lsqs
def test_a_planted_matrix_is_recovered_where_nothing_was_known(kind: str, lsq: Lsq) -> None:
    M, known = planted(200, 150, [100.0, 80.0, 50.0, 30.0], 0), mask_of((200, 150), 0.35, 7)
    problem = made(kind, M, known)
    fit = alternate(problem, *masked_svd(problem, 4, generator(1)), generator(2), lsq=lsq)
    assert fit.settled
    assert len(fit.losses) <= 31
    unknown = known == 0
    assert relative((fit.U @ fit.V.T)[unknown], M[unknown]) < 1e-8


def test_the_masked_svd_is_that_of_the_known_entries_over_their_share() -> None:
    M, known = planted(60, 40, [9.0, 7.0, 5.0], 0), mask_of((60, 40), 0.5, 1)
    U, S, Vh = torch.linalg.svd(M * known / known.mean())
    wanted = U[:, :3] * S[:3] @ Vh[:3]
    assert relative(product(masked_svd(Elementwise(M, known), 3, generator(0))), wanted) < 1e-12
    assert relative(product(masked_svd(Entries.of(M, known), 3, generator(0))), wanted) < 1e-2  # a few powers, no more


def test_clipping_zeroes_what_is_beyond_the_bound_and_a_bound_that_is_wide_changes_nothing() -> None:
    M, known = planted(60, 40, [9.0, 7.0, 5.0], 0), mask_of((60, 40), 0.5, 1)
    M[11] *= 50  # a row that the others say nothing about
    problem = Elementwise(M, known)
    free = product(masked_svd(problem, 3, generator(0)))
    assert relative(product(masked_svd(problem, 3, generator(0), incoherence=100.0)), free) < 1e-12
    U, V = masked_svd(problem, 3, generator(0), incoherence=1.5)
    assert float(U[11].norm()) < 0.1 * float(U.norm(dim=1).max()) < float(free[11].norm())
    assert torch.isfinite(V).all()


@kinds
@lsqs
def test_entries_of_weight_zero_have_no_influence_on_a_single_bit(kind: str, lsq: Lsq) -> None:
    M, Omega = randn(30, 20, seed=0), uneven((30, 20), 1) * mask_of((30, 20), 0.5, 2)
    fits = []
    for other in (M, torch.where(Omega > 0, M, 1e6 * randn(30, 20, seed=3)), torch.where(Omega > 0, M, math.nan)):
        problem = made(kind, other, Omega)
        fits += [
            alternate(problem, *start(problem, 3, generator(4)), generator(5), lsq=lsq, sweeps=5)
            for start in (masked_svd, scaled_svd)
        ]
    for fit, first in zip(fits[2:], fits[:2] * 2, strict=True):
        assert torch.equal(fit.U, first.U)
        assert torch.equal(fit.V, first.V)


@kinds
@lsqs
@pytest.mark.parametrize("ridge", [0.0, 1e-10])
def test_rows_and_columns_with_few_entries_or_none_stay_finite(kind: str, lsq: Lsq, ridge: float) -> None:
    M, Omega = randn(30, 20, seed=0), mask_of((30, 20), 0.6, 1)
    Omega[:, 3] = Omega[5] = 0
    Omega[7], Omega[7, :2] = 0, 1  # two entries for rank 4
    Omega[:, 9], Omega[2, 9] = 0, 1
    problem = made(kind, M, Omega)
    fit = alternate(problem, *masked_svd(problem, 4, generator(0)), generator(1), lsq=lsq, ridge=ridge, sweeps=20)
    assert torch.isfinite(fit.U).all()
    assert torch.isfinite(fit.V).all()
    assert float((fit.U @ fit.V.T)[5].norm()) <= 1e-9 * float(fit.U.norm() * fit.V.norm())
    assert float((fit.U @ fit.V.T)[:, 3].norm()) <= 1e-9 * float(fit.U.norm() * fit.V.norm())
