"""The solver altmin: what it promises of its product, its three weights, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from solver_cases import EPS, F64, generator, orthogonal, randn, solved
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers import AltminSolver, Decomposition, Moments, altmin, svd
from lrc.solvers.altmin import SPARSE, UNREACHED


def fisher(shape: tuple[int, int], seed: int, unit: float = 1e-6) -> Tensor:
    """Elementwise weights over four orders of magnitude, in a small unit."""
    return unit * 10 ** (4 * torch.rand(*shape, dtype=F64, generator=generator(seed)) - 2)


def weighed(W: Tensor, Omega: Tensor, rank: int, **options: Any) -> Decomposition:
    return solved(altmin, W, Moments(weight_fisher=Omega), rank=rank, **options)


def error(W: Tensor, Omega: Tensor, terms: Decomposition, rank: int) -> float:
    B, A, _ = terms.truncate(rank, F64)
    return float((Omega * (W.double() - B @ A).square()).sum())


def pruned(shape: tuple[int, int], rank: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix of low rank, and the same with all but a share of its entries zero."""
    W = orthogonal(shape[0], seed)[:, :rank] @ orthogonal(shape[1], seed + 1)[:rank] * 10
    return W, torch.where(torch.rand(*shape, generator=generator(seed + 2)) < share, W, 0.0)


SHAPES = [(24, 16, 4), (16, 24, 4), (12, 1, 1), (1, 12, 1), (1, 1, 1), (9, 9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lsq", ["exact", "sketch_pcg"])
def test_the_promised_loss_is_the_measured_one_at_no_rank_and_at_the_rank_asked_for(
    shape: tuple[int, int, int], lsq: str
) -> None:
    m, n, rank = shape
    W, Omega = randn(m, n, seed=0), fisher((m, n), 1)
    terms = weighed(W, Omega, rank, lsq=lsq)
    losses, total = terms.losses(), float((Omega * W.square()).sum())
    assert terms.B.shape == (m, rank)
    assert terms.A.shape == (rank, n)
    assert terms.B.dtype == terms.A.dtype == F64
    assert (losses[1:] <= losses[:-1]).all()
    assert (terms.S[1:] <= terms.S[:-1]).all()
    assert abs(float(losses[0]) - total) <= 1e-12 * total
    assert abs(float(losses[rank]) - error(W, Omega, terms, rank)) <= 1e-12 * total
    assert terms.unit == "squared weight error weighed by its Fisher information"


def test_fisher_weights_give_less_weighed_error_than_the_svd_and_than_the_scaled_svd() -> None:
    W, Omega = randn(40, 30, seed=0), fisher((40, 30), 1)
    plain = solved(svd, W, rank=8)
    one, many = weighed(W, Omega, 8, sweeps=1), weighed(W, Omega, 8, sweeps=20)
    errors = [error(W, Omega, terms, 8) for terms in (plain, one, many)]
    assert errors[2] < 0.8 * errors[1] < 0.8 * errors[0]


def test_both_ways_to_refit_end_in_the_same_error() -> None:
    W = orthogonal(40, 0)[:, :30] * 0.5 ** torch.arange(30) @ orthogonal(30, 1)
    Omega = 1e-6 * (1 + torch.rand(40, 30, dtype=F64, generator=generator(2)))
    asked: dict[str, Any] = {"sweeps": 200, "tolerance": 1e-12}
    exact, sketched = (weighed(W, Omega, 5, lsq=lsq, **asked) for lsq in ("exact", "sketch_pcg"))
    assert math.isclose(error(W, Omega, exact, 5), error(W, Omega, sketched, 5), rel_tol=1e-8)
    assert float((exact.B @ exact.A - sketched.B @ sketched.A).norm()) <= 1e-6 * float(W.norm())


def test_the_unit_of_the_fisher_information_changes_nothing_but_the_loss() -> None:
    W, Omega = randn(20, 14, seed=0), fisher((20, 14), 1)
    one, other = weighed(W, Omega, 3), weighed(W, Omega * 2.0**-70, 3)
    assert torch.allclose(one.B @ one.A, other.B @ other.A, rtol=1e-9, atol=1e-12)
    assert torch.allclose(one.losses() * 2.0**-70, other.losses(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_tiny_and_huge_weights_neither_under_nor_overflow(scale: float) -> None:
    W, Omega = randn(20, 14, seed=0), fisher((20, 14), 1)
    one, other = weighed(W, Omega, 3, sweeps=5, tolerance=0), weighed(W * scale, Omega, 3, sweeps=5, tolerance=0)
    assert torch.allclose(other.B @ other.A / scale, one.B @ one.A, rtol=1e-6, atol=1e-9)
    assert torch.allclose(other.losses() / scale**2, one.losses(), rtol=1e-6, atol=0)


def test_weights_none_and_a_dense_weight_without_zeros_give_the_svd() -> None:
    W = randn(12, 9, seed=0)
    wanted = solved(svd, W, rank=4)
    for weights in ("none", "nonzero"):
        terms = solved(altmin, W, rank=4, weights=weights)
        assert torch.allclose(terms.B @ terms.A, wanted.B @ wanted.A, rtol=0, atol=64 * EPS * 12 * float(wanted.S[0]))
        assert torch.allclose(terms.losses(), wanted.losses(), rtol=1e-10)
        assert terms.notes == ("weights of rank one: the scaled SVD is the minimum",)


def test_fisher_weights_of_rank_one_give_the_closed_form_without_a_sweep() -> None:
    a, b = 0.1 + torch.rand(20, dtype=F64, generator=generator(1)), torch.rand(15, dtype=F64, generator=generator(2)) + 0.1
    W, roots = randn(20, 15, seed=0), torch.outer(a.sqrt(), b.sqrt())
    U, S, Vh = torch.linalg.svd(roots * W)
    terms = weighed(W, 1e-5 * torch.outer(a, b), 6)
    for rank in range(1, 7):  # here every truncation is the best of its rank
        B, A, _ = terms.truncate(rank, F64)
        assert torch.allclose(B @ A, (U[:, :rank] * S[:rank] @ Vh[:rank]) / roots, rtol=0, atol=1e-12 * float(W.norm()))
        assert math.isclose(float(terms.losses()[rank]), 1e-5 * float(S[rank:].square().sum()), rel_tol=1e-9)
    assert terms.notes == ("weights of rank one: the scaled SVD is the minimum",)


@pytest.mark.parametrize("share", [0.12, 0.4])
@pytest.mark.parametrize("lsq", ["exact", "sketch_pcg"])
def test_zeros_of_a_pruned_weight_are_filled_in(share: float, lsq: str) -> None:
    W, left = pruned((200, 160), 3, share, 0)
    assert (float((left != 0).double().mean()) < SPARSE) == (share == 0.12)  # both representations
    terms = solved(altmin, left, rank=3, weights="nonzero", lsq=lsq, sweeps=100)
    gone = left == 0
    assert float((terms.B @ terms.A - W)[gone].norm()) < 1e-8 * float(W[gone].norm())
    assert terms.unit == "squared error of the nonzero weights"
    assert terms.notes[-1].endswith("of the entries, settled")


@pytest.mark.parametrize("init", ["auto", "svd", "masked_svd"])
def test_every_start_leads_to_the_planted_matrix(init: str) -> None:
    W, left = pruned((80, 60), 2, 0.5, 0)
    terms = solved(altmin, left, rank=2, weights="nonzero", init=init, sweeps=200)
    assert float((terms.B @ terms.A - W).norm()) < 1e-7 * float(W.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_weights_are_solved_in_float64_and_kept_in_float32(dtype: torch.dtype) -> None:
    W, Omega = randn(20, 14, seed=0).to(dtype), fisher((20, 14), 1)
    terms, wanted = weighed(W, Omega, 4), weighed(W.double(), Omega, 4)
    assert terms.B.dtype == terms.A.dtype == torch.float32
    assert torch.allclose((terms.B @ terms.A).double(), wanted.B @ wanted.A, rtol=1e-4, atol=1e-5)
    B, A, _ = terms.truncate(4, dtype)
    assert B.dtype == A.dtype == dtype


def test_more_terms_than_the_weight_has_are_not_made_up() -> None:
    terms = solved(altmin, randn(5, 3, seed=0), Moments(weight_fisher=fisher((5, 3), 1)), rank=9)
    assert terms.B.shape == (5, 3)
    assert float(terms.losses()[3]) <= 1e-18


def test_damping_counts_every_entry_and_leaves_entries_without_a_weight_closer_to_what_they_are() -> None:
    W, Omega = randn(30, 24, seed=0), fisher((30, 24), 1)
    Omega[Omega < 1e-7] = 0
    free, damped = weighed(W, Omega, 8), weighed(W, Omega, 8, damping=1.0)
    total = Omega + Omega.mean()
    assert math.isclose(float(damped.losses()[8]), error(W, total, damped, 8), rel_tol=1e-9)
    unseen = Omega == 0
    far, near = (float((terms.B @ terms.A - W)[unseen].norm()) for terms in (free, damped))
    assert near < 0.5 * far
    left = torch.where(unseen, 0.0, W)
    assert "100.0% of the entries" in solved(altmin, left, rank=3, weights="nonzero", damping=0.1).notes[-1]


def test_outputs_and_inputs_without_a_weight_are_reported_and_finite() -> None:
    W, Omega = randn(20, 14, seed=0), fisher((20, 14), 1)
    Omega[3] = Omega[:, 5] = Omega[:, 6] = 0
    terms = weighed(W, Omega, 4)
    assert terms.notes[:2] == (
        "1 of 20 outputs have no entry with a weight: the product is 0 there",
        "2 of 14 inputs have no entry with a weight: the product is 0 there",
    )
    P = terms.B @ terms.A
    assert torch.isfinite(P).all()
    assert float(P[3].norm() + P[:, 5:7].norm()) < 1e-8 * float(P.norm())


@pytest.mark.parametrize("weights", ["fisher", "nonzero"])
def test_where_nothing_has_a_weight_the_svd_is_taken_and_costs_nothing(weights: str) -> None:
    W = randn(6, 4, seed=0) if weights == "fisher" else torch.zeros(6, 4, dtype=F64)
    terms = solved(altmin, W, Moments(weight_fisher=torch.zeros(6, 4, dtype=F64)), rank=2, weights=weights)
    wanted = solved(svd, W, rank=2)
    assert torch.allclose(terms.B @ terms.A, wanted.B @ wanted.A, rtol=0, atol=1e-12)
    assert terms.notes[0] == UNREACHED
    assert float(terms.losses().max()) == 0


def test_the_same_seed_gives_the_same_bytes() -> None:
    _, left = pruned((60, 50), 3, 0.12, 0)
    one, two = (solved(altmin, left, rank=3, weights="nonzero", lsq="sketch_pcg") for _ in range(2))
    assert torch.equal(one.B, two.B)
    assert torch.equal(one.A, two.A)


def test_the_bias_is_handed_on_and_none_is_added() -> None:
    W, b, moments = randn(4, 6, seed=0), randn(4, seed=1), Moments(weight_fisher=fisher((4, 6), 1))
    assert solved(altmin, W, moments, rank=2).truncate(2, F64).bias is None
    bias = solved(altmin, W, moments, b, rank=2).truncate(2, torch.float32).bias
    assert bias is not None
    assert torch.equal(bias, b.float())


def test_only_fisher_weights_need_calibration() -> None:
    assert AltminSolver().needs == {"weight_fisher"}
    assert AltminSolver(weights="nonzero").needs == AltminSolver(weights="none").needs == frozenset()
    assert AltminSolver.leading
    assert not AltminSolver.nested


def test_a_missing_fisher_information_is_refused_with_the_way_out() -> None:
    wanted = r"moments.weight_fisher: expected the weight_fisher that this solver needs, got none. Give `calibration` data"
    with pytest.raises(SolverError, match=wanted):
        solved(altmin, randn(5, 4, seed=0))


def test_a_fisher_information_that_cannot_be_one_is_refused() -> None:
    W, Omega = randn(5, 4, seed=0), fisher((5, 4), 1)
    with pytest.raises(SolverError, match=r"moments.weight_fisher: expected shape \(5, 4\), got shape \(4, 5\)"):
        weighed(W, Omega.T, 2)
    Omega[1, 2] = -1e-9
    with pytest.raises(SolverError, match=r"moments.weight_fisher: expected numbers >= 0, got 1 negative of 20"):
        weighed(W, Omega, 2)
    Omega[1, 2] = math.nan
    with pytest.raises(SolverError, match=r"moments.weight_fisher: expected finite numbers, got 1 NaN and 0 infinite of 20"):
        weighed(W, Omega, 2)


@pytest.mark.parametrize("weights", ["nonzero", "none"])
def test_bad_weights_biases_and_ranks_are_refused(weights: str) -> None:
    W = randn(5, 4, seed=0)
    with pytest.raises(SolverError, match="weight: expected finite numbers, got 1 NaN"):
        solved(altmin, torch.where(W[0, 0] == W, math.nan, W), rank=2, weights=weights)
    with pytest.raises(SolverError, match=r"bias: expected shape \(5,\)"):
        solved(altmin, W, bias=randn(4, seed=1), rank=2, weights=weights)
    with pytest.raises(SolverError, match="weight: expected a matrix"):
        altmin(torch.zeros(0, 4), None, Moments(), 1, AltminSolver(weights=weights), generator(0))
    with pytest.raises(SolverError, match="max_rank: expected at least 1, got 0"):
        altmin(W, None, Moments(), 0, AltminSolver(weights=weights), generator(0))


@pytest.mark.parametrize(
    "bad", [{"ridge": -1.0}, {"damping": -1.0}, {"sweeps": 0}, {"tolerance": -0.1}, {"lsq": "cg"}, {"weights": "mask"}]
)
def test_options_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AltminSolver(**bad)
