"""Randomized truncation: within its tolerance on every kind of spectrum, and honest about how it got there."""

from typing import Any

import pytest
import torch
from solver_cases import F64, generator, orthogonal, randn
from torch import Tensor

from lrc.solvers import Decomposition, Moments, auto, gram, randomized
from lrc.solvers.excess import excess, measured
from lrc.solvers.randomized import directions
from lrc.solvers.subspace import orthonormal, row_gram
from lrc.spec.registry import Rule

SIZE, RANK = 400, 80
INDEX = torch.arange(1, SIZE + 1, dtype=F64)
SPECTRA = {
    "1/i": 1 / INDEX,
    "1/sqrt(i)": INDEX**-0.5,
    "1/i^2": INDEX**-2,
    "exponential": torch.exp(-INDEX / 20),
    "flat": torch.ones(SIZE, dtype=F64),
    "step at the rank": torch.where(INDEX <= RANK, 1.0, 0.9).double(),
    "clusters": torch.cat([torch.ones(60), 0.5 * torch.ones(60), 0.1 * torch.ones(SIZE - 120)]).double(),
    "outliers": torch.cat(
        [torch.logspace(3, 1, 20), torch.rand(SIZE - 20, generator=generator(9)).sort(descending=True)[0]]
    ).double(),
    "one huge": torch.cat([torch.tensor([1e4]), torch.ones(SIZE - 1)]).double(),
}
either = pytest.mark.parametrize("rule", [randomized, auto], ids=["randomized", "auto"])


def with_spectrum(S: Tensor, rows: int = SIZE, columns: int = SIZE, seed: int = 0) -> Tensor:
    k = len(S)
    return orthogonal(rows, seed)[:, :k] * S @ orthogonal(columns, seed + 1)[:k]


def solve(rule: Rule[Any, Any], W: Tensor, rank: int = RANK, seed: int = 0, **options: Any) -> Decomposition:
    made = rule(W, None, Moments(), rank, rule.options(**options), generator(seed))
    assert isinstance(made, Decomposition)
    return made


def error(W: Tensor, terms: Decomposition) -> float:
    return float((W.double() - terms.B.double() @ terms.A.double()).norm())


def least(W: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(W.double())[rank:].norm())


@either
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_the_error_is_within_the_tolerance_of_the_least(rule: Rule[Any, Any], name: str, dtype: torch.dtype) -> None:
    W = with_spectrum(SPECTRA[name]).to(dtype)
    for seed in range(3):
        terms = solve(rule, W, seed=seed)
        rounding = 4 * torch.finfo(terms.B.dtype).eps * float(W.norm())
        assert error(W, terms) <= 1.01 * least(W, RANK) + rounding
        assert terms.notes


@pytest.mark.parametrize("shape", [(600, 300), (300, 600), (1000, 260)])
@pytest.mark.parametrize("rank", [1, 7, 60])
def test_rectangular_weights_either_way_round(shape: tuple[int, int], rank: int) -> None:
    W = randn(*shape, seed=3).float()
    terms = solve(randomized, W, rank)
    assert terms.B.shape == (shape[0], rank)
    assert terms.A.shape == (rank, shape[1])
    assert any("filter" in note for note in terms.notes)
    assert error(W, terms) <= 1.01 * least(W, rank)


@either
def test_the_promised_loss_is_the_measured_one_at_every_rank(rule: Rule[Any, Any]) -> None:
    W = with_spectrum(SPECTRA["1/i"]).float()
    terms = solve(rule, W)
    losses = terms.losses()
    assert (losses[1:] <= losses[:-1]).all()
    for rank in (1, 10, 40, RANK):
        B, A, _ = terms.truncate(rank, torch.float32)
        squared = float((W.double() - B.double() @ A.double()).square().sum())
        assert float(losses[rank]) == pytest.approx(squared, abs=64 * torch.finfo(torch.float32).eps * float(W.square().sum()))


def test_leading_terms_are_those_of_the_svd() -> None:
    W = with_spectrum(SPECTRA["1/i"])
    U, S, Vh = torch.linalg.svd(W)
    terms = solve(randomized, W)
    for rank in (1, 5, 20):
        B, A, _ = terms.truncate(rank, F64)
        assert float((B @ A - U[:, :rank] * S[:rank] @ Vh[:rank]).norm()) <= 1e-3 * float(S[rank:].norm())


@either
def test_the_same_seed_gives_the_same_bytes(rule: Rule[Any, Any]) -> None:
    W = randn(SIZE, SIZE, seed=1).float()
    one, two = solve(rule, W, seed=5), solve(rule, W, seed=5)
    assert torch.equal(one.B, two.B)
    assert torch.equal(one.A, two.A)


def test_the_bound_is_never_below_the_true_excess() -> None:
    for name, S in SPECTRA.items():
        W = with_spectrum(S)
        best = least(W, RANK)
        for width in (RANK, RANK + 10, 2 * RANK):
            basis = orthonormal(randn(width, SIZE, seed=width) @ W.T @ W)
            kept = torch.linalg.svd(basis @ W.T @ W @ basis.T)[0].T[:RANK] @ basis
            found = measured(W, kept, kept @ W.T)
            true = (found.remainder**0.5 / best) - 1
            assert excess(W, row_gram(W.T), found, generator(1)) >= true - 1e-6, name


def test_a_tolerance_that_no_random_subspace_meets_ends_in_the_exact_decomposition_and_a_note() -> None:
    W = randn(SIZE, SIZE, seed=2).float()
    terms = solve(randomized, W, tolerance=1e-9, max_iterations=1)
    assert terms.notes[-1] == "exact eigh of the Gram matrix"
    assert error(W, terms) <= (1 + 1e-5) * least(W, RANK)


def test_wide_subspaces_are_not_searched_for() -> None:
    W = randn(40, 30, seed=0)
    assert directions(W, 10, randomized.options()) is None
    terms = solve(randomized, W, 10)
    assert terms.notes == ("exact eigh of the Gram matrix: a subspace would be nearly as large as the weight",)
    assert error(W, terms) <= least(W, 10) * (1 + 1e-9)


@either
@pytest.mark.parametrize("rank", [1, 5, RANK])
@pytest.mark.parametrize("kind", ["zero", "one row of use", "low rank", "tiny", "huge"])
def test_degenerate_weights_give_finite_terms(rule: Rule[Any, Any], kind: str, rank: int) -> None:
    W = torch.zeros(SIZE, SIZE)
    if kind == "one row of use":
        W[3] = randn(SIZE, seed=0).float()
    elif kind == "low rank":
        W = (randn(SIZE, 4, seed=0) @ randn(4, SIZE, seed=1)).float()
    elif kind in ("tiny", "huge"):
        W = randn(SIZE, SIZE, seed=0).float() * (1e-30 if kind == "tiny" else 1e30)
    terms = solve(rule, W, rank)
    assert torch.isfinite(terms.B).all()
    assert torch.isfinite(terms.A).all()
    assert torch.isfinite(terms.losses()).all()
    assert error(W, terms) <= 1.01 * least(W, rank) + 1e-5 * float(W.double().norm())


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 500)])
def test_single_rows_and_columns(shape: tuple[int, int]) -> None:
    W = randn(*shape, seed=4)
    for rule in (randomized, auto):
        assert error(W, solve(rule, W, 1)) <= least(W, 1) + 1e-12 * float(W.norm())


def test_the_bias_is_handed_on() -> None:
    W, b = randn(SIZE, SIZE, seed=0).float(), randn(SIZE, seed=1).float()
    for rule in (randomized, auto):
        found = rule(W, b, Moments(), RANK, rule.options(), generator(0)).truncate(3, torch.float32).bias
        assert found is not None
        assert torch.equal(found, b)


def test_auto_says_which_way_it_took() -> None:
    large, small = randn(SIZE, SIZE, seed=0).float(), randn(30, 20, seed=0).float()
    assert solve(auto, large).notes[0] == "auto: randomized"
    assert solve(auto, large, SIZE).notes == ("auto: gram",)
    assert solve(auto, small, 5).notes == ("auto: gram",)


def test_auto_takes_the_svd_where_the_gram_matrix_is_blind() -> None:
    S = torch.logspace(0, -14, 40, dtype=F64)
    W = with_spectrum(S, 40, 40)
    blind = 36
    terms = solve(auto, W, blind)
    assert terms.notes == ("auto: svd",)
    assert error(W, terms) <= 1.01 * float(S[blind:].norm()) + 1e-15
    assert error(W, solve(gram, W, blind)) <= 1e-8
