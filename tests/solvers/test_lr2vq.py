"""LR2VQ and its clusters: the invariants of the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers import Coded, Lr2vqSolver, Moments, lr2vq
from lrc.solvers.kmeans import distances, kmeans, nearest, softly, squared_error
from lrc.solvers.lr2vq import orthonormal

F64 = torch.float64


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(seed))


def solved(W: Tensor, rank: int, seed: int = 0, **options: object) -> Coded:
    return lr2vq(W, Moments(), rank, Lr2vqSolver.model_validate(options), torch.Generator().manual_seed(seed))


def made_of(found: Coded, shape: tuple[int, ...]) -> Tensor:
    assert found.codebook is not None
    assert found.codes is not None
    return (found.codebook[found.codes] @ found.basis).reshape(shape)


def test_as_many_codewords_as_different_pieces_reproduce_the_weight() -> None:
    few = weight(5, 4)
    W = few[torch.randint(0, 5, (12 * 3,), generator=torch.Generator().manual_seed(1))].reshape(12, 12)
    torch.testing.assert_close(made_of(solved(W, 4, m=4, k=5), W.shape), W, atol=1e-10, rtol=0)


def test_a_codeword_for_every_piece_is_the_truncated_svd() -> None:
    W = weight(6, 20)
    V = W.reshape(-1, 5)
    U, S, Vh = torch.linalg.svd(V, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(made_of(solved(W, 3, m=5, k=24), V.shape), best, atol=1e-10, rtol=0)
    torch.testing.assert_close(solved(W, 3, m=5, k=None).coefficients @ solved(W, 3, m=5, k=None).basis, best)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 6), pieces=st.integers(1, 4), rows=st.integers(2, 9), k=st.integers(2, 8), data=st.data())
def test_the_error_is_that_of_the_dimensions_and_that_of_the_codes(
    m: int, pieces: int, rows: int, k: int, data: st.DataObject
) -> None:
    W, d = weight(rows, m * pieces, seed=k), data.draw(st.integers(1, m))
    found = solved(W, d, m=m, k=k)
    total = float((W - made_of(found, W.shape)).square().sum())
    size = float(W.square().sum())
    assert total == pytest.approx(found.low_rank + found.clustering, rel=1e-6, abs=1e-12 * size)
    V = W.reshape(-1, m)
    assert found.low_rank == pytest.approx(float(torch.linalg.svdvals(V)[d:].square().sum()), rel=1e-6, abs=1e-12 * size)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(d, dtype=F64), atol=1e-6, rtol=0)


def test_the_gauge_does_not_matter_and_is_fixed_by_an_orthonormal_basis() -> None:
    found = solved(weight(12, 24), 3, m=6, k=7)
    G = weight(3, 3, seed=5)
    assert found.codebook is not None
    E, P = found.codebook @ G, torch.linalg.solve(G, found.basis)
    torch.testing.assert_close(E @ P, found.codebook @ found.basis, atol=1e-10, rtol=0)
    Z, Q, turn = orthonormal(E, P)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3, dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(Z @ Q, E @ P, atol=1e-10, rtol=0)
    torch.testing.assert_close(E @ turn, Z)
    again, same, _ = orthonormal(Z, Q)
    torch.testing.assert_close(again, Z)
    torch.testing.assert_close(same, Q)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(2, 9), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_turns_of_lloyd_never_lose_and_codes_are_the_nearest(n: int, k: int, d: int, seed: int) -> None:
    rows = weight(n, d, seed)
    found = kmeans(rows, k, 20, torch.Generator().manual_seed(seed))
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in zip(found.history, found.history[1:], strict=False))
    apart = torch.cdist(rows, found.codewords)
    chosen = apart[torch.arange(n), found.codes]
    assert bool((chosen <= apart.min(1).values + 1e-7).all())
    assert found.history[-1] == pytest.approx(squared_error(rows, found.codewords, found.codes))
    if n <= k:
        assert found.history[-1] == 0


def test_kmeans_is_as_good_as_that_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="skipped: comparison with scikit-learn, which is not installed")
    rows = weight(400, 3)
    ours = min(kmeans(rows, 12, 100, torch.Generator().manual_seed(seed)).history[-1] for seed in range(4))
    theirs = cluster.KMeans(12, n_init=4, random_state=0).fit(rows.numpy()).inertia_
    assert ours < 1.03 * theirs


def test_a_codeword_without_pieces_moves_to_one_that_is_far_away() -> None:
    from lrc.solvers.kmeans import means

    rows = torch.tensor([[0.0], [1.0], [10.0]])
    moved = means(rows, torch.tensor([[0.0], [50.0]]), torch.tensor([0, 0, 0]))
    assert moved.tolist() == [[pytest.approx(11 / 3)], [10.0]]


def test_soft_assignments_become_hard_ones_as_the_temperature_falls() -> None:
    rows = weight(50, 3).requires_grad_()
    start = kmeans(rows.detach(), 6, 50, torch.Generator().manual_seed(0)).codewords
    _, soft = softly(rows, start, 1e-7, 1)
    hard = start[nearest(rows.detach(), start)]
    torch.testing.assert_close(soft.detach(), hard, atol=1e-6, rtol=0)
    E, soft = softly(rows, start, 0.2, 3)
    A = torch.softmax(-distances(rows.detach(), E.detach()) / (0.2 * (rows - rows.mean(0)).square().sum(1).mean().detach()), 1)
    torch.testing.assert_close(A.sum(1), torch.ones(50, dtype=F64))
    torch.testing.assert_close(soft.detach(), A @ E.detach())
    soft.square().sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad.abs().sum(1) > 0).all())


def test_soft_assignments_in_parts_have_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    M = weight(3, 3, seed=4)

    def gradient() -> Tensor:
        rows = weight(50, 3).requires_grad_()
        _, soft = softly(rows, weight(6, 3, seed=1), 0.1, 2, M)
        (found,) = torch.autograd.grad((soft * weight(50, 3, seed=2)).sum(), rows)
        return found

    whole = gradient()
    monkeypatch.setattr("lrc.solvers.kmeans.ROWS", 7)
    torch.testing.assert_close(gradient(), whole)


def test_the_chosen_dimension_has_the_least_error_of_all() -> None:
    W = weight(64, 24) @ torch.diag(torch.linspace(2, 0.1, 24, dtype=F64))
    errors = {}
    for d in range(1, 7):
        found = solved(W, d, m=6, k=16)
        errors[d] = found.low_rank + found.clustering
    chosen = solved(W, 6, m=6, k=16, choose=True)
    assert chosen.low_rank + chosen.clustering <= min(errors.values()) * 1.05  # k-means starts from other rows
    assert chosen.notes == (f"{len(chosen.basis)} of at most 6 dimensions lose least",)


def test_all_zeros_and_wrong_sizes() -> None:
    found = solved(torch.zeros(4, 8, dtype=F64), 2, m=4, k=3)
    assert made_of(found, (4, 8)).abs().sum() == 0
    with pytest.raises(SolverError, match="m: expected a divisor of in_features=8, got 3"):
        solved(weight(4, 8), 2, m=3)
    with pytest.raises(SolverError, match="rank: expected at most m=4"):
        solved(weight(4, 8), 5, m=4)
