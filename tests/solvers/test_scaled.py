"""ASVD and FWSVD: the Eckart-Young bound in a norm that scales the weight's columns."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from solver_cases import (
    EPS,
    F64,
    SHAPES,
    gradients,
    inputs,
    mean_square,
    moments_of,
    orthogonal,
    outputs,
    product,
    product_error,
    randn,
    ranks_of,
    samples,
    seeds,
    shapes,
    solved,
    spaced,
    weight_of,
    weights,
    with_samples,
)
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers import Moments, Need, asvd, fwsvd, svd, whitened
from lrc.solvers.ladder import FLOOR
from lrc.solvers.scaled import SHIFT
from lrc.spec.registry import Rule

both = pytest.mark.parametrize("rule", [asvd, fwsvd], ids=["asvd", "fwsvd"])
Solver = Rule[Any, Any]


def moments_for(X: Tensor, seed: int, out_features: int) -> Moments:
    """The moments of inputs, and of random gradients at as many outputs."""
    return with_samples(moments_of(X), X, 0.1 * randn(len(X), out_features, seed=seed + 50))


def scale_of(rule: Solver, moments: Moments, alpha: float = 0.5) -> Tensor:
    """What the columns are scaled by, as the papers have it; for FWSVD with the documented floor."""
    if rule is asvd:
        assert moments.magnitudes is not None
        return moments.magnitudes**alpha + SHIFT
    assert moments.weight_fisher is not None
    squares = moments.weight_fisher.sum(0)
    return squares.clamp(min=FLOOR * float(squares.max())).sqrt()


def rounding(W: Tensor, scale: Tensor) -> float:
    return 64 * sum(W.shape) * EPS * float((W * scale).norm())


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, seed=seeds)
def test_every_truncation_reaches_the_bound_of_the_scaled_weight_and_promises_it(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    moments = moments_for(X, seed, shape[0])
    terms, scale = solved(rule, W, moments), scale_of(rule, moments)
    S = torch.linalg.svdvals(W * scale)
    for rank in ranks_of(terms):
        best = float(S[rank:].norm())
        assert float(((W - product(terms, rank)) * scale).norm()) <= best + rounding(W, scale)
        if not terms.notes:
            assert abs(float(terms.losses()[rank]) ** 0.5 - best) <= rounding(W, scale)


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds)
def test_products_are_those_of_the_papers(rule: Solver, shape: tuple[int, int], seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    moments = moments_for(X, seed, shape[0])
    terms, scale = solved(rule, W, moments), scale_of(rule, moments)
    U, S, Vh = torch.linalg.svd(W * scale, full_matrices=False)
    spread = float(scale.max() / scale.min())
    for rank in ranks_of(terms):
        expected = U[:, :rank] * S[:rank] @ (Vh[:rank] / scale)
        tolerance = spread * product_error(S, rank, sum(shape), float(W.norm()))
        assert float((product(terms, rank) - expected).norm()) <= tolerance


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data", ["full", "dead", "zero"])
def test_full_rank_gives_the_weight_back_whatever_the_scale(rule: Solver, shape: tuple[int, int], data: str) -> None:
    W, X = randn(*shape, seed=1), samples(shape[1], 2, data)
    moments = moments_for(X, 3, shape[0])
    terms, scale = solved(rule, W, moments), scale_of(rule, moments)
    spread = float(scale.max() / scale.min()) if float(scale.min()) > 0 else 1.0
    assert float((product(terms, min(shape)) - W).norm()) <= 64 * sum(shape) * EPS * spread * float(W.norm())


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds, level=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_scale_that_is_the_same_for_all_inputs_gives_plain_svd(
    rule: Solver, shape: tuple[int, int], seed: int, level: float
) -> None:
    W = spaced(*shape, seed)
    even = Moments(
        magnitudes=torch.full((shape[1],), level, dtype=F64),
        weight_fisher=randn(shape[0], 1, seed=seed).square().expand(shape) * level,
    )
    terms, plain = solved(rule, W, even), solved(svd, W)
    for rank in ranks_of(terms):
        difference = float((product(terms, rank) - product(plain, rank)).norm())
        assert difference <= product_error(plain.S, rank, max(shape), float(W.norm()))


@settings(max_examples=15, deadline=None)
@given(shape=shapes, data=inputs, seed=seeds)
def test_asvd_with_alpha_0_is_plain_svd(shape: tuple[int, int], data: str, seed: int) -> None:
    W = spaced(*shape, seed)
    terms, plain = solved(asvd, W, moments_for(samples(shape[1], seed, data), seed, shape[0]), alpha=0.0), solved(svd, W)
    for rank in ranks_of(terms):
        difference = float((product(terms, rank) - product(plain, rank)).norm())
        assert difference <= product_error(plain.S, rank, max(shape), float(W.norm()))


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, seed=seeds)
def test_whitened_svd_never_errs_more_on_the_calibration_inputs(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    moments = moments_for(X, seed, shape[0])
    ours, best = solved(rule, W, moments), solved(whitened, W, moments, center=False)
    tolerance = (64 * (sum(shape) + len(X)) * EPS + FLOOR) * float(W.square().sum() * X.square().sum(1).mean())
    for rank in ranks_of(ours):
        errors = [mean_square(outputs(terms, rank, X) - X @ W.T) for terms in (best, ours)]
        assert errors[0] <= errors[1] + tolerance


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_fwsvd_is_best_by_fisher_where_that_does_not_vary_along_the_outputs(shape: tuple[int, int], seed: int) -> None:
    W = randn(*shape, seed=seed)
    fisher = (0.1 + randn(shape[1], seed=seed + 1).square()).expand(shape)
    terms, plain = solved(fwsvd, W, Moments(weight_fisher=fisher)), solved(svd, W)
    tolerance = 64 * sum(shape) * EPS * float((fisher * W.square()).sum()) * float(fisher.max() / fisher.min())

    def loss(approximation: Tensor) -> float:
        return float((fisher * (W - approximation).square()).sum())

    for rank in ranks_of(terms):
        ours = loss(product(terms, rank))
        assert abs(shape[0] * ours - float(terms.losses()[rank])) <= shape[0] * tolerance
        Q = orthogonal(shape[0], seed + rank)[:, :rank]
        near = product(terms, rank) + (0 if rank == 0 else 1e-3) * Q @ randn(rank, shape[1], seed=seed + 2)
        lower = near if rank == min(shape) else solved(svd, near, rank=max(rank, 1))
        rival = lower if isinstance(lower, Tensor) else product(lower, rank)
        assert ours <= loss(rival) + tolerance
        assert ours <= loss(product(plain, rank)) + tolerance
        assert ours <= loss(Q @ Q.T @ W) + tolerance


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_sides_of_a_term_have_equal_norms(rule: Solver, shape: tuple[int, int]) -> None:
    terms = solved(rule, spaced(*shape, 1), moments_for(samples(shape[1], 2), 3, shape[0]))
    assert torch.allclose(terms.B.norm(dim=0), terms.A.norm(dim=1), rtol=64 * EPS * max(shape), atol=0)


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_terms_that_are_not_stored_still_count_in_the_loss(
    rule: Solver, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    W = randn(*shape, seed=seed)
    moments = moments_for(samples(shape[1], seed), seed, shape[0])
    rank = data.draw(st.integers(1, min(shape)))
    some, every = solved(rule, W, moments, rank=rank), solved(rule, W, moments)
    assert some.B.shape == (shape[0], rank)
    assert some.A.shape == (rank, shape[1])
    tolerance = 64 * EPS * float(every.losses()[0])
    assert torch.allclose(some.losses(), every.losses()[: rank + 1], rtol=64 * EPS, atol=tolerance)


@both
def test_the_bias_is_handed_on_and_none_is_added(rule: Solver) -> None:
    W, b, moments = randn(4, 6, seed=0), randn(4, seed=1), moments_for(samples(6, 2), 3, 4)
    assert solved(rule, W, moments).truncate(2, F64).bias is None
    bias = solved(rule, W, moments, b).truncate(2, torch.float32).bias
    assert bias is not None
    assert torch.equal(bias, b.float())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_weights_are_decomposed_in_float64_and_rounded_once(rule: Solver, dtype: torch.dtype) -> None:
    W, moments = spaced(6, 4, 0).to(dtype), moments_for(samples(4, 2, "dead"), 3, 6)
    terms, scale = solved(rule, W, moments), scale_of(rule, moments)
    assert terms.B.dtype == terms.A.dtype == torch.float32
    B, A, _ = terms.truncate(4, dtype)
    assert B.dtype == A.dtype == dtype
    assert torch.isfinite(B).all()
    assert torch.isfinite(A).all()
    assert torch.allclose(terms.S, torch.linalg.svdvals(W.double() * scale), rtol=0, atol=rounding(W.double(), scale))


def test_a_weight_that_the_loss_does_not_see_is_told_in_the_notes_and_costs_nothing() -> None:
    W = randn(3, 4, seed=0)
    blind = solved(fwsvd, W, Moments(weight_fisher=torch.zeros(3, 4, dtype=F64)))
    assert blind.notes == ("weight_fisher is zero: the loss does not see this layer, and its errors are not weighed",)
    assert not blind.losses().any()
    assert float((product(blind, 2) - product(solved(svd, W), 2)).norm()) <= 1e3 * EPS * float(W.norm())
    half = torch.ones(3, 4, dtype=F64)
    half[:, 1::2] = 0
    assert solved(fwsvd, W, Moments(weight_fisher=half)).notes == ("weight_fisher is nothing for 2 of 4 inputs: floor 1e-10",)
    assert solved(fwsvd, W, Moments(weight_fisher=half + 1)).notes == ()


def test_they_ask_for_one_statistic_each_and_name_their_norms() -> None:
    assert asvd.options.needs == {Need.MAGNITUDES}
    assert fwsvd.options.needs == {Need.WEIGHT_FISHER}
    moments = moments_for(samples(4, 2), 3, 5)
    assert solved(asvd, randn(5, 4, seed=0), moments).unit == "squared weight error scaled by input magnitudes"
    assert solved(fwsvd, randn(5, 4, seed=0), moments).unit == "squared weight error scaled by Fisher information"
    assert fwsvd.options().settled(logits=True).fisher == "sampled"
    assert fwsvd.options().settled(logits=False).fisher == "outputs"
    assert fwsvd.options(fisher="labels").settled(logits=False).fisher == "labels"


# What is refused.


@both
def test_a_missing_or_negative_statistic_is_refused_by_name(rule: Solver) -> None:
    (need,) = rule.options.needs
    W = randn(5, 4, seed=0)
    wanted = rf"moments.{need}: expected the {need} that this solver needs, got none. Give `calibration` data"
    with pytest.raises(SolverError, match=wanted):
        solved(rule, W, moments_of(samples(4, 1), gradients(5, 2)))
    negative = {Need.MAGNITUDES: -torch.ones(4, dtype=F64), Need.WEIGHT_FISHER: -torch.ones(5, 4, dtype=F64)}[need]
    wanted = rf"moments.{need}: expected numbers that are not negative, got {negative.numel()} negative of"
    with pytest.raises(SolverError, match=wanted):
        solved(rule, W, Moments(**{str(need): negative}))


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan")])
def test_a_power_out_of_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValidationError, match="alpha"):
        asvd.options(alpha=alpha)
