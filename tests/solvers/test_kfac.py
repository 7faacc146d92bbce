"""K-FAC whitening: losses in nats per token, comparable between layers, and reducible to the simpler solvers."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    DAMPING,
    EPS,
    F64,
    INPUTS,
    SHAPES,
    damped,
    gradients,
    inputs,
    moments_of,
    outputs,
    product,
    product_error,
    randn,
    ranks_of,
    rounding,
    samples,
    second_order,
    seeds,
    shapes,
    solved,
    spaced,
    weight_of,
    weights,
)
from torch import Tensor

from lrc.ranks import ParamsKept, SiteCurve, choose
from lrc.solvers import Decomposition, Moments, kfac, propagated_target, svd, whitened
from lrc.solvers.kfac import GROWTH, growth
from lrc.solvers.ladder import root
from lrc.solvers.terms import ordered_terms

damping = st.sampled_from([0.0, 1e-6, 1e-2, 1.0])


@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, seed=seeds, share=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_predicted_loss_is_the_second_order_one_of_the_damped_moments(
    shape: tuple[int, int], weight: str, data: str, seed: int, share: float
) -> None:
    W, X, g = weight_of(shape, seed, weight), samples(shape[1], seed, data), gradients(shape[0], seed)
    moments = moments_of(X, g)
    terms = solved(kfac, W, moments, damping_in=share)
    C, G = damped(moments.gram, share), damped(moments.fisher, 1.0)
    losses = terms.losses()
    assert terms.unit == "nats per token"
    assert terms.notes == (() if data != "zero" else terms.notes)
    assert (losses[1:] <= losses[:-1]).all()
    for rank in ranks_of(terms):
        assert abs(float(losses[rank]) - second_order(W - product(terms, rank), C, G)) <= rounding(W, C, G)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds)
def test_no_other_product_of_that_rank_has_a_lower_predicted_loss(shape: tuple[int, int], seed: int) -> None:
    """The bound is the tail of the singular values of K^T W L: the losses are those of torch.linalg."""
    W, X, g = randn(*shape, seed=seed), samples(shape[1], seed), gradients(shape[0], seed)
    moments = moments_of(X, g)
    terms = solved(kfac, W, moments)
    C, G = damped(moments.gram, DAMPING), damped(moments.fisher, 1.0)
    S = torch.linalg.svdvals(torch.linalg.cholesky(G).T @ W @ torch.linalg.cholesky(C))
    assert torch.allclose(0.5**0.5 * S, terms.S.double() * terms.scale**0.5, rtol=0, atol=rounding(W, C, G) ** 0.5)
    for rank in ranks_of(terms):
        assert abs(float(terms.losses()[rank]) - 0.5 * float(S[rank:].square().sum())) <= rounding(W, C, G)
        assert abs(second_order(W - product(terms, rank), C, G) - 0.5 * float(S[rank:].square().sum())) <= rounding(W, C, G)


@pytest.mark.parametrize("data", INPUTS)
@pytest.mark.parametrize("gradient", INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight(shape: tuple[int, int], data: str, gradient: str) -> None:
    W = randn(*shape, seed=1)
    terms = solved(kfac, W, moments_of(samples(shape[1], 2, data), gradients(shape[0], 3, gradient)))
    # damping bounds both conditions: 1 + n / 1e-6 for C, 1 + m / 1 for G
    digits = ((1 + shape[1] * 1e6) * (1 + shape[0])) ** 0.5
    assert float((W - product(terms, min(shape))).norm()) <= 8 * sum(shape) * EPS * digits * float(W.norm())


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, level=st.sampled_from([1e-4, 1.0, 1e4]))
def test_isotropic_gradients_give_whitened_svd(shape: tuple[int, int], seed: int, level: float) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    moments = moments_of(X)
    both_sided = Moments(gram=moments.gram, mean=moments.mean, fisher=level * torch.eye(shape[0], dtype=F64))
    terms = solved(kfac, W, both_sided, damping_in=0.0, damping_out=0.0)
    other = solved(whitened, W, moments)
    condition = float(torch.linalg.cond(X))
    assert torch.allclose(
        terms.losses(), 0.5 * level * other.losses(), rtol=64 * sum(shape) * EPS * condition, atol=EPS * level
    )
    for rank in ranks_of(terms):
        tolerance = condition * product_error(other.S, rank, sum(shape), float(W.norm()))
        assert float((product(terms, rank) - product(other, rank)).norm()) <= tolerance


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, share=damping)
def test_isotropic_inputs_and_gradients_give_plain_svd(shape: tuple[int, int], seed: int, share: float) -> None:
    m, n = shape
    W = spaced(m, n, seed)
    moments = Moments(gram=3 * torch.eye(n, dtype=F64), fisher=0.1 * torch.eye(m, dtype=F64))
    terms, plain = solved(kfac, W, moments, damping_in=share, damping_out=share), solved(svd, W)
    for rank in ranks_of(terms):
        difference = float((product(terms, rank) - product(plain, rank)).norm())
        assert difference <= product_error(plain.S, rank, max(shape), float(W.norm()))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_on_a_linear_gaussian_model_the_predicted_increase_is_the_true_one(shape: tuple[int, int], seed: int) -> None:
    """Loss 1/2 (y - t)^T M (y - t) with t = W x + noise that no linear map of x explains: its Fisher G is M."""
    m, n = shape
    W, X = randn(m, n, seed=seed), samples(n, seed)
    M = damped(moments_of(samples(m, seed + 1)).gram, 0.1)
    noise = randn(len(X), m, seed=seed + 2)
    noise = noise - X @ torch.linalg.lstsq(X, noise, driver="gelsd").solution
    target = X @ W.T + noise

    def loss(weight: Tensor) -> float:
        error = X @ weight.T - target
        return 0.5 * float((error @ M).mul(error).sum(1).mean())

    moments = moments_of(X)
    terms = solved(kfac, W, Moments(gram=moments.gram, fisher=M), damping_in=0.0, damping_out=0.0)
    C = moments.gram
    assert C is not None
    scale = float(W.square().sum() * C.trace() * M.trace()) + loss(W)
    tolerance = 64 * (m + n + len(X)) * EPS * float(torch.linalg.cond(X)) * scale
    for rank in ranks_of(terms):
        assert abs(loss(product(terms, rank)) - loss(W) - float(terms.losses()[rank])) <= tolerance


@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds)
def test_ten_times_the_gradient_is_a_hundred_times_the_loss_and_the_same_products(shape: tuple[int, int], seed: int) -> None:
    W, X, g = spaced(*shape, seed), samples(shape[1], seed), gradients(shape[0], seed)
    once, louder = solved(kfac, W, moments_of(X, g)), solved(kfac, W, moments_of(X, 10 * g))
    assert torch.allclose(louder.losses(), 100 * once.losses(), rtol=1e-12, atol=1e-13 * float(louder.losses()[0]))
    condition = (1 + shape[1] * 1e6) ** 0.5
    for rank in ranks_of(once):
        tolerance = condition * product_error(once.S, rank, sum(shape), float(W.norm()))
        assert float((product(once, rank) - product(louder, rank)).norm()) <= tolerance


def curve(terms: Decomposition, shape: tuple[int, int], name: str) -> SiteCurve:
    return SiteCurve(name, *shape, terms.losses(), terms.S, additive=terms.unit == "nats per token")


def ranks_at_half(scales: list[float]) -> list[int]:
    """The ranks of three layers whose output gradients are multiplied by `scales`."""
    shapes = [(12, 16), (16, 12), (14, 14)]
    curves = []
    for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        moments = moments_of(samples(shape[1], i), scale * gradients(shape[0], i))
        curves.append(curve(solved(kfac, randn(*shape, seed=i), moments), shape, str(i)))
    found = choose(curves, ParamsKept(params_kept=0.5))
    return [choice.rank or 99 for choice in found.values()]


def test_a_louder_gradient_moves_rank_towards_its_layer_and_a_louder_loss_moves_none() -> None:
    before = ranks_at_half([1.0, 1.0, 1.0])
    assert ranks_at_half([10.0, 10.0, 10.0]) == before
    for i in range(3):
        after = ranks_at_half([10.0 if i == j else 1.0 for j in range(3)])
        assert after[i] > before[i]
        assert sum(after[j] < before[j] for j in range(3) if j != i) >= 1


@settings(max_examples=20, deadline=None)
@given(shape=shapes, data=st.sampled_from(["full", "few", "dead"]), center=st.sampled_from(["auto", True]), seed=seeds)
def test_the_bias_keeps_the_mean_output_at_every_rank(shape: tuple[int, int], data: str, center: bool | str, seed: int) -> None:
    W, X, b = randn(*shape, seed=seed), samples(shape[1], seed, data), randn(shape[0], seed=seed + 9)
    moments = moments_of(X, gradients(shape[0], seed))
    terms = solved(kfac, W, moments, b, center=center)
    mean = (X @ W.T + b).mean(0)
    covariance = torch.cov(X.T, correction=0).reshape(shape[1], shape[1])
    G = damped(moments.fisher, 1.0)
    C = damped(moments.gram, 0.0)
    for rank in ranks_of(terms):
        B, A, _ = terms.truncate(rank, F64)
        tolerance = 64 * (sum(shape) + len(X)) * EPS * float((W.norm() + B.norm() * A.norm()) * X.norm(dim=1).max() + b.norm())
        assert float((outputs(terms, rank, X).mean(0) - mean).norm()) <= tolerance
        expected = second_order(W - B @ A, damped(covariance, DAMPING), G)
        assert abs(float(terms.losses()[rank]) - expected) <= rounding(W, C, G)


def test_auto_adds_no_bias_to_a_layer_without_one() -> None:
    W, moments = randn(5, 4, seed=1), moments_of(samples(4, 2), gradients(5, 3))
    assert solved(kfac, W, moments).truncate(2, F64).bias is None
    assert solved(kfac, W, moments, center=True).truncate(2, F64).bias is not None
    b = randn(5, seed=3)
    kept = solved(kfac, W, moments, b, center=False).truncate(2, F64).bias
    assert kept is not None
    assert torch.equal(kept, b)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, blend=st.sampled_from([0.0, 0.5, 1.0]), center=st.booleans(), seed=seeds)
def test_with_changed_inputs_the_blended_target_is_fitted_on_them(
    shape: tuple[int, int], blend: float, center: bool, seed: int
) -> None:
    W, X, b = randn(*shape, seed=seed), samples(shape[1], seed), randn(shape[0], seed=seed + 8)
    X_new, g = X + 0.3 * randn(*X.shape, seed=seed + 7), gradients(shape[0], seed)
    terms = solved(kfac, W, moments_of(X_new, g, dense=X), b, center=center, blend=blend)
    target = propagated_target(W, moments_of(X_new, dense=X), blend, center=center)
    seen = X_new - X_new.mean(0) if center else X_new
    C, G = damped(moments_of(seen).gram, DAMPING), damped(moments_of(X, g).fisher, 1.0)
    for rank in ranks_of(terms):
        assert abs(float(terms.losses()[rank]) - second_order(target - product(terms, rank), C, G)) <= rounding(target, C, G)
        if center:
            B, A, _ = terms.truncate(rank, F64)
            norms = float((W.norm() + B.norm() * A.norm()) * (X.norm(dim=1).max() + X_new.norm(dim=1).max()) + b.norm())
            kept = outputs(terms, rank, X_new).mean(0) - (X @ W.T + b).mean(0)
            assert float(kept.norm()) <= 64 * (sum(shape) + len(X)) * EPS * norms


def test_damping_of_the_gradients_is_raised_until_the_weight_keeps_its_size_and_a_note_says_so() -> None:
    """Two terms that nearly cancel in a direction that neither the loss nor the inputs see: alone, each is huge."""
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=F64) / 2**0.5
    blind = torch.tensor([1.0, 1e-3], dtype=F64)
    seen = turn * torch.tensor([1.0, 0.99], dtype=F64) @ turn  # Kᵀ W L
    W = seen / blind[:, None] / blind
    moments = Moments(gram=torch.diag(blind**2), fisher=torch.diag(blind**2))
    undamped = ordered_terms(W, root(torch.diag(blind**2), "G"), root(torch.diag(blind**2), "C"), 2, F64)
    assert growth(undamped, W) > 50
    terms = solved(kfac, W, moments, damping_in=0.0, damping_out=0.0)
    assert growth(terms, W) <= GROWTH
    found = re.fullmatch(r"damping_out raised from 0 to (\S+): the truncated weight outgrew the weight", terms.notes[0])
    assert found is not None
    C, G = torch.diag(blind**2), damped(moments.fisher, float(found[1]))
    for rank in ranks_of(terms):
        assert abs(float(terms.losses()[rank]) - second_order(W - product(terms, rank), C, G)) <= rounding(W, C, G)


def test_a_layer_that_the_loss_does_not_see_costs_nothing_and_says_so() -> None:
    W, X = spaced(5, 4, 0), samples(4, 1)
    terms = solved(kfac, W, moments_of(X, torch.zeros(9, 5, dtype=F64)))
    assert terms.notes == ("fisher is zero: calibration does not reach this layer, and its errors are not weighed",)
    assert torch.equal(terms.losses(), torch.zeros(5, dtype=F64))
    other = solved(whitened, W, moments_of(X), damping=DAMPING)
    tolerance = float(torch.linalg.cond(X)) * product_error(other.S, 2, 9, float(W.norm()))
    assert float((product(terms, 2) - product(other, 2)).norm()) <= tolerance


@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, gradient=inputs, share_in=damping, share_out=damping, seed=seeds)
def test_every_statistic_gives_finite_terms_of_modest_size(
    shape: tuple[int, int], weight: str, data: str, gradient: str, share_in: float, share_out: float, seed: int
) -> None:
    W = weight_of(shape, seed, weight)
    moments = moments_of(samples(shape[1], seed, data), gradients(shape[0], seed, gradient))
    terms = solved(kfac, W, moments, damping_in=share_in, damping_out=share_out)
    assert torch.isfinite(terms.B).all()
    assert torch.isfinite(terms.A).all()
    assert torch.isfinite(terms.losses()).all()
    assert growth(terms, W) <= GROWTH


def test_kfac_asks_for_inputs_and_gradients_and_damps_by_default_as_measured() -> None:
    options = kfac.options()
    assert options.needs == {"inputs", "gradients"}
    assert (options.damping_in, options.damping_out, options.blend, options.fisher) == (DAMPING, "auto", 0.5, "auto")
    assert {kind: options.at(kind).damping_out for kind in ("linear", "conv", "embedding")} == {
        "linear": 1.0, "conv": 0.1, "embedding": 1.0,
    }  # fmt: skip
    assert kfac.options(damping_out=0.3).at("conv").damping_out == 0.3


def test_a_weight_that_is_no_site_is_damped_as_a_linear() -> None:
    W = weight_of((5, 4), 0, "full")
    moments = moments_of(samples(4, 0, "full"), gradients(5, 0, "full"))
    plain, told = solved(kfac, W, moments), solved(kfac, W, moments, damping_out=1.0)
    assert torch.equal(plain.S, told.S)
