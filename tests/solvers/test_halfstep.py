"""Refitting one factor: every row against numpy, the sketch's condition number, and no step that raises the objective."""

import math

import numpy as np
import pytest
import torch
from completion_cases import SHAPES, kinds, lsqs, made, mask_of, objective, relative, uneven
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EPS, F64, generator, randn, seeds

from lrc.solvers.alternating import balanced
from lrc.solvers.elementwise import Elementwise
from lrc.solvers.entries import Entries
from lrc.solvers.halfstep import SKETCH, Lsq, conjugate, exact, preconditioner, refitted


@kinds
@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(SHAPES), seed=seeds)
def test_products_with_the_weights_are_those_of_the_dense_matrices(kind: str, case: tuple[int, int, int], seed: int) -> None:
    m, n, k = case
    M, Omega = randn(m, n, seed=seed), uneven((m, n), seed) * mask_of((m, n), 0.6, seed + 1)
    X, F = randn(m, k, seed=seed + 2), randn(n, k, seed=seed + 3)
    for problem, W, values, left, right in (
        (made(kind, M, Omega), Omega, M, X, F),
        (made(kind, M, Omega).T, Omega.T, M.T, F, X),
    ):
        assert problem.shape == W.shape
        close = {"rtol": 1e-12, "atol": 1e-12 * float(W.sum() + 1)}
        assert torch.allclose(problem.weigh(right), W @ right, **close)
        assert torch.allclose(problem.weigh_values(right), (W * values) @ right, **close)
        assert torch.allclose(problem.normal(right, left), (W * (left @ right.T)) @ right, **close)
        assert math.isclose(problem.loss(left, right), float((W * (values - left @ right.T) ** 2).sum()), rel_tol=1e-12)
        assert math.isclose(problem.mean_weight, float(W.mean()), rel_tol=1e-12)
        assert problem.density == float((W > 0).double().mean())
        for mean, dense in zip(problem.means(), (W.mean(1), W.mean(0)), strict=True):
            assert torch.allclose(mean, dense, **close)
        half = problem.block(1, len(W)) if len(W) > 1 else problem.block(0, 1)
        assert torch.allclose(half.weigh_values(right), ((W * values) @ right)[-half.shape[0] :], **close)


@kinds
@lsqs
@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(SHAPES), seed=seeds)
def test_a_refitted_row_is_the_least_squares_solution_on_its_entries(
    kind: str, lsq: Lsq, case: tuple[int, int, int], seed: int
) -> None:
    m, n, k = case
    M, Omega = randn(m, n, seed=seed), uneven((m, n), seed) * mask_of((m, n), 0.8, seed + 1)
    F = torch.linalg.qr(randn(n, k, seed=seed + 3))[0]
    problem, start = made(kind, M, Omega), torch.zeros(m, k, dtype=F64)
    X = exact(problem, F, start, 0.0) if lsq == "exact" else conjugate(problem, F, start, 0.0, 1e-13, generator(0))
    for i in range(m):
        known = Omega[i] > 0
        root = Omega[i, known].sqrt().numpy()
        A, b = root[:, None] * F[known].numpy(), root * M[i, known].numpy()
        condition = float(np.linalg.cond(A)) if len(b) >= k else math.inf
        if condition < 1e4:  # normal equations square it
            wanted = np.linalg.lstsq(A, b, rcond=None)[0]
            tolerance = 256 * EPS * condition**2 + (0 if lsq == "exact" else 1e-12 * condition * float(Omega.max()))
            error = float(np.linalg.norm(X[i].numpy() - wanted))
            assert error <= tolerance * max(1.0, float(np.linalg.norm(b)), float(np.linalg.norm(wanted)))


@kinds
def test_sketched_conjugate_gradients_agree_with_the_normal_equations(kind: str) -> None:
    for seed in range(5):
        M, Omega = randn(80, 300, seed=seed), uneven((80, 300), seed + 1) * mask_of((80, 300), 0.5, seed + 2)
        F, start = randn(300, 6, seed=seed + 3), randn(80, 6, seed=seed + 4)
        problem = made(kind, M, Omega)
        found = conjugate(problem, F, start, 1e-6, 1e-10, generator(seed))
        assert relative(found, exact(problem, F, start, 1e-6)) < 1e-8


@kinds
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("weighing", ["mask", "uneven"])
def test_the_sketch_makes_a_condition_number_under_10(kind: str, share: float, weighing: str) -> None:
    k = 8
    for seed in range(4):
        Omega = mask_of((40, 500), share, seed) * (1 if weighing == "mask" else uneven((40, 500), seed + 1))
        F = randn(500, k, seed=seed + 2) * torch.logspace(0, 4, k, dtype=F64)
        L = preconditioner(made(kind, Omega, Omega).sketch(F, SKETCH * k, generator(seed)), 0.0)
        for i in range(40):
            A = Omega[i].sqrt()[:, None] * F
            assert float(torch.linalg.cond(A)) > 1e3
            assert float(torch.linalg.cond(torch.linalg.solve_triangular(L[i], A.T, upper=False))) < 10


@kinds
def test_a_row_with_few_entries_is_not_sketched(kind: str) -> None:
    Omega = uneven((5, 20), 0) * (mask_of((5, 20), 0.5, 1) if kind == "entries" else 1)
    F = randn(20, 6, seed=2)
    A = made(kind, Omega, Omega).sketch(F, 24, generator(0))
    assert torch.allclose(A.mT @ A, torch.einsum("ij,ja,jb->iab", Omega, F, F), rtol=1e-12)


@kinds
@settings(max_examples=15, deadline=None)
@given(case=st.sampled_from(SHAPES), seed=seeds, ridge=st.sampled_from([0.0, 1e-3]))
def test_no_half_step_and_no_balancing_raises_the_objective(
    kind: str, case: tuple[int, int, int], seed: int, ridge: float
) -> None:
    m, n, k = case
    M, Omega = randn(m, n, seed=seed), uneven((m, n), seed) * mask_of((m, n), 0.7, seed + 1)
    U, V = randn(m, k, seed=seed + 2), randn(n, k, seed=seed + 3)
    problem = made(kind, M, Omega)
    slack = 1e-10 * float((Omega * M.square()).sum()) + 1e-14
    for lsq in ("exact", "sketch_pcg"):
        before = objective(M, Omega, U, V, ridge)
        for _ in range(4):
            after = []
            V = refitted(problem.T, U, V, ridge, lsq, generator(seed))
            after.append(objective(M, Omega, U, V, ridge))
            U = refitted(problem, V, U, ridge, lsq, generator(seed))
            after.append(objective(M, Omega, U, V, ridge))
            U, V = balanced(U, V)
            after.append(objective(M, Omega, U, V, ridge))
            for value in after:
                assert value <= before * (1 + 1e-10) + slack
                before = value


def test_a_row_with_too_few_entries_gets_the_solution_nearest_to_what_it_was() -> None:
    F, b, X = randn(3, 5, seed=0), randn(1, 3, seed=1), randn(1, 5, seed=2)
    problem = Elementwise(b, torch.ones(1, 3, dtype=F64))
    for start in (torch.zeros(1, 5, dtype=F64), X):
        step = np.linalg.lstsq(F.numpy(), (b - start @ F.T)[0].numpy(), rcond=None)[0]
        assert relative(exact(problem, F, start, 0.0)[0], start[0] + torch.from_numpy(step)) < 1e-8


def test_entries_may_come_in_any_order_and_twice() -> None:
    M, Omega = randn(12, 9, seed=0), uneven((12, 9), 1) * mask_of((12, 9), 0.5, 2)
    row, column = Omega.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(row), generator=generator(3))
    row, column = row[shuffled], column[shuffled]
    value, weight = M[row, column], Omega[row, column]
    F, X = randn(9, 2, seed=4), torch.zeros(12, 2, dtype=F64)
    one = exact(Entries(row, column, value, weight, (12, 9)), F, X, 0.0)
    assert torch.equal(one, exact(Entries.of(M, Omega), F, X, 0.0))
    twice = Entries(row.repeat(2), column.repeat(2), value.repeat(2), weight.repeat(2) / 2, (12, 9))
    assert torch.allclose(exact(twice, F, X, 0.0), one, rtol=1e-9, atol=1e-9)


def test_blocks_of_rows_give_what_all_rows_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    M, Omega = randn(30, 20, seed=0), uneven((30, 20), 1) * mask_of((30, 20), 0.5, 2)
    F, X = randn(20, 4, seed=3), torch.zeros(30, 4, dtype=F64)
    whole = [refitted(made(kind, M, Omega), F, X, 1e-3, "exact", generator(0)) for kind in ("entries", "elementwise")]
    monkeypatch.setattr("lrc.solvers.halfstep.BLOCK", 7 * 16)
    monkeypatch.setattr("lrc.solvers.entries.CHUNK", 12)
    for kind, wanted in zip(("entries", "elementwise"), whole, strict=True):
        for lsq in ("exact", "sketch_pcg"):
            found = refitted(made(kind, M, Omega), F, wanted, 1e-3, lsq, generator(0))
            assert relative(found, wanted) < 1e-10
    assert relative(whole[0], whole[1]) < 1e-10
