"""Whitened SVD: the least output error on the calibration inputs, with the mean kept by the bias, and the update step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    EPS,
    F64,
    INPUTS,
    SHAPES,
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
)
from torch import Tensor

from lrc.solvers import Moments, gram, propagated_target, svd, whitened
from lrc.solvers.ladder import FLOOR

variants = st.sampled_from(["v1", "v2", "cholesky", "eigh"])


def rounding(W: Tensor, X: Tensor) -> float:
    """What rounding may add to a mean squared error of outputs, the root of a moment included."""
    return 64 * (sum(W.shape) + len(X)) * EPS * float(W.square().sum() * X.square().sum(1).mean())


def floored(W: Tensor, X: Tensor) -> float:
    """The error that the floor under small eigenvalues of the moment may pretend."""
    return FLOOR * float(W.square().sum() * X.square().sum(1).mean())


@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, variant=variants, seed=seeds)
def test_the_promised_loss_is_the_error_on_the_samples(
    shape: tuple[int, int], weight: str, data: str, variant: str, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    terms = solved(whitened, W, moments_of(X), variant=variant)
    losses = terms.losses()
    assert terms.unit == "squared output error per token"
    assert (losses[1:] <= losses[:-1]).all()
    for rank in ranks_of(terms):
        measured = mean_square(X @ W.T - outputs(terms, rank, X))
        assert measured - rounding(W, X) <= float(losses[rank]) <= measured + rounding(W, X) + floored(W, X)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, variant=variants, seed=seeds)
def test_no_other_product_of_that_rank_has_less_error(shape: tuple[int, int], variant: str, seed: int) -> None:
    """The bound is the tail of the outputs' singular values: Eckart and Young, applied to W X."""
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    terms = solved(whitened, W, moments_of(X), variant=variant)
    S = torch.linalg.svdvals(X @ W.T)
    for rank in ranks_of(terms):
        best = float(S[rank:].square().sum()) / len(X)
        assert abs(mean_square(X @ W.T - outputs(terms, rank, X)) - best) <= rounding(W, X)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, seed=seeds)
def test_the_error_is_no_larger_than_that_of_plain_svd(shape: tuple[int, int], weight: str, data: str, seed: int) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    terms, plain = solved(whitened, W, moments_of(X)), solved(svd, W)
    for rank in ranks_of(terms):
        ours, theirs = (mean_square(X @ W.T - outputs(t, rank, X)) for t in (terms, plain))
        assert ours <= theirs + rounding(W, X) + floored(W, X)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_both_versions_are_the_projection_on_the_outputs_principal_directions(shape: tuple[int, int], seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    first, second = solved(whitened, W, moments_of(X)), solved(whitened, W, moments_of(X), variant="v2")
    U, S, _ = torch.linalg.svd(W @ X.T, full_matrices=False)
    condition = float(torch.linalg.cond(X))
    for rank in range(1, min(shape) + 1):
        expected = U[:, :rank] @ U[:, :rank].T @ W
        tolerance = condition * product_error(S[: min(shape)], rank, sum(shape), float(W.norm()))
        assert float((product(first, rank) - expected).norm()) <= tolerance
        assert float((product(second, rank) - expected).norm()) <= tolerance


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, variant=variants, level=st.sampled_from([1e-6, 1.0, 1e6]))
def test_isotropic_inputs_give_plain_svd(shape: tuple[int, int], seed: int, variant: str, level: float) -> None:
    W = spaced(*shape, seed)
    terms = solved(whitened, W, Moments(gram=level * torch.eye(shape[1], dtype=F64)), variant=variant)
    plain = solved(svd, W)
    for rank in ranks_of(terms):
        difference = float((product(terms, rank) - product(plain, rank)).norm())
        assert difference <= product_error(plain.S, rank, max(shape), float(W.norm()))
    assert torch.allclose(terms.losses(), level * plain.losses(), rtol=0, atol=64 * max(shape) * EPS * level)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("data", INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight_on_the_samples(shape: tuple[int, int], data: str, variant: str) -> None:
    W, X = randn(*shape, seed=1), samples(shape[1], 2, data)
    terms = solved(whitened, W, moments_of(X), variant=variant)
    error = X @ W.T - outputs(terms, min(shape), X)
    assert mean_square(error) <= rounding(W, X)


@pytest.mark.parametrize("data", INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight_everywhere_even_where_no_sample_went(shape: tuple[int, int], data: str) -> None:
    W, X = randn(*shape, seed=1), samples(shape[1], 2, data)
    terms = solved(whitened, W, moments_of(X))
    digits = FLOOR**-0.5 if shape[0] > shape[1] and data != "full" else 1e3  # the smallest root that L is divided by
    assert float((W - product(terms, min(shape))).norm()) <= 64 * sum(shape) * EPS * digits * float(W.norm())


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 6), (5, 5)])
def test_a_singular_moment_is_told_in_the_notes(shape: tuple[int, int]) -> None:
    n = shape[1]
    W, X = randn(*shape, seed=1), samples(n, 2, "few")
    note = f"gram is singular (rank {len(X)} of {n}): eigh with floor 1e-10"
    for variant in ("v1", "v2"):
        assert solved(whitened, W, moments_of(X), variant=variant).notes == (note,)
    assert solved(whitened, W, moments_of(samples(n, 2))).notes == ()
    assert solved(whitened, W, moments_of(X), damping=0.01).notes == ()


def test_inputs_that_never_come_leave_plain_svd_without_a_loss() -> None:
    W = spaced(5, 4, 0)
    terms, plain = solved(whitened, W, moments_of(samples(4, 1, "zero"))), solved(svd, W)
    assert terms.notes == ("gram is zero: calibration does not reach this layer, and its errors are not weighed",)
    assert torch.equal(terms.losses(), torch.zeros(5, dtype=F64))
    assert torch.allclose(product(terms, 2), product(plain, 2), rtol=0, atol=product_error(plain.S, 2, 5, float(W.norm())))


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_weighs_the_weight_itself(shape: tuple[int, int]) -> None:
    W, X = randn(*shape, seed=1), samples(shape[1], 2)
    C = moments_of(X).gram
    assert C is not None
    damped = C + 0.3 * C.diagonal().mean() * torch.eye(shape[1], dtype=F64)
    terms = solved(whitened, W, moments_of(X), damping=0.3)
    S = torch.linalg.svdvals(W @ torch.linalg.cholesky(damped))
    expected = torch.cat([S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1)])
    assert torch.allclose(terms.losses(), expected, rtol=0, atol=2 * rounding(W, X))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, data=st.sampled_from(["full", "few", "dead"]), center=st.sampled_from(["auto", True]), seed=seeds)
def test_the_bias_keeps_the_mean_output_at_every_rank(shape: tuple[int, int], data: str, center: bool | str, seed: int) -> None:
    W, X, b = randn(*shape, seed=seed), samples(shape[1], seed, data), randn(shape[0], seed=seed + 9)
    Y = X @ W.T + b
    terms = solved(whitened, W, moments_of(X), b, center=center)
    centred = solved(whitened, W, Moments(gram=torch.cov(X.T, correction=0).reshape(shape[1], shape[1])))
    tolerance = 64 * (sum(shape) + len(X)) * EPS * float(W.norm() * X.norm(dim=1).max() + b.norm())
    for rank in ranks_of(terms):
        y = outputs(terms, rank, X)
        assert float((y.mean(0) - Y.mean(0)).norm()) <= tolerance
        assert abs(mean_square(y - Y) - float(terms.losses()[rank])) <= rounding(W, X) + floored(W, X)
        assert abs(float(terms.losses()[rank] - centred.losses()[rank])) <= rounding(W, X) + floored(W, X)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, data=inputs, seed=seeds)
def test_centring_never_raises_the_error(shape: tuple[int, int], data: str, seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed, data)
    centred, plain = (solved(whitened, W, moments_of(X), center=center) for center in (True, False))
    for rank in ranks_of(plain):
        errors = [mean_square(X @ W.T - outputs(terms, rank, X)) for terms in (centred, plain)]
        assert errors[0] <= errors[1] + rounding(W, X) + floored(W, X)


def test_auto_adds_no_bias_to_a_layer_without_one() -> None:
    W, X = randn(5, 4, seed=1), samples(4, 2)
    assert solved(whitened, W, moments_of(X)).truncate(2, F64).bias is None
    assert solved(whitened, W, moments_of(X), center=True).truncate(2, F64).bias is not None
    b = randn(5, seed=3)
    assert torch.equal(solved(whitened, W, moments_of(X), b, center=False).truncate(2, F64).bias, b)
    assert not torch.equal(solved(whitened, W, moments_of(X), b).truncate(2, F64).bias, b)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, blend=st.sampled_from([0.0, 0.25, 1.0]), seed=seeds)
def test_the_propagated_target_is_the_damped_least_squares_of_the_dense_outputs(
    shape: tuple[int, int], blend: float, seed: int
) -> None:
    W, n = randn(*shape, seed=seed), shape[1]
    X = samples(n, seed)
    X_new = X + 0.3 * randn(*X.shape, seed=seed + 7)
    level = 1e-3 * float(X_new.square().mean())
    ridge = torch.cat([X_new, (level * len(X)) ** 0.5 * torch.eye(n, dtype=F64)])
    wanted = torch.cat([X @ W.T, torch.zeros(n, shape[0], dtype=F64)])
    fitted = torch.linalg.lstsq(ridge, wanted, driver="gelsd").solution.T
    found = propagated_target(W, moments_of(X_new, dense=X), blend)
    tolerance = 64 * (n + len(X)) * EPS * float(torch.linalg.cond(ridge)) ** 2 * float(fitted.norm() + W.norm())
    assert float((found - (blend * fitted + (1 - blend) * W)).norm()) <= tolerance


def test_inputs_that_did_not_change_leave_the_target_the_weight() -> None:
    W, X = randn(5, 4, seed=1), samples(4, 2)
    assert torch.equal(propagated_target(W, moments_of(X), 1.0), W)
    assert torch.equal(propagated_target(W, moments_of(X, dense=X), 0.0), W)
    same = propagated_target(W, moments_of(X, dense=X), 1.0, damping=0.0)
    assert float((same - W).norm()) <= 64 * 8 * EPS * float(torch.linalg.cond(X)) ** 2 * float(W.norm())


@settings(max_examples=20, deadline=None)
@given(shape=shapes, center=st.booleans(), seed=seeds)
def test_with_changed_inputs_the_blended_target_is_fitted_on_them(shape: tuple[int, int], center: bool, seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    X_new, b = X + 0.3 * randn(*X.shape, seed=seed + 7), randn(shape[0], seed=seed + 8)
    moments = moments_of(X_new, dense=X)
    terms = solved(whitened, W, moments, b, center=center, blend=0.5)
    target = propagated_target(W, moments, 0.5, center=center)
    seen = X_new - X_new.mean(0) if center else X_new
    for rank in ranks_of(terms):
        measured = mean_square(seen @ (target - product(terms, rank)).T)
        assert abs(float(terms.losses()[rank]) - measured) <= rounding(target, X_new)
        if center:
            kept = outputs(terms, rank, X_new).mean(0) - (X @ W.T + b).mean(0)
            assert float(kept.norm()) <= rounding(target, X_new) ** 0.5 + rounding(target, X_new)


def unreachable(Y: Tensor, X: Tensor) -> float:
    """The mean squared error that even the best map of X leaves."""
    return mean_square(Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, blend=st.sampled_from([0.0, 0.5, 1.0]), center=st.booleans(), seed=seeds)
def test_the_update_never_increases_the_error_on_its_own_samples(
    shape: tuple[int, int], blend: float, center: bool, seed: int
) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    X_new, b = X @ orthogonal(shape[1], seed + 5) * 0.5 + X, randn(shape[0], seed=seed + 8)
    moments, Y = moments_of(X_new, dense=X), X @ W.T + b
    options = {"blend": blend, "center": center}
    before, after = (solved(whitened, W, moments, b, update=update, **options) for update in ("none", "lstsq"))
    tolerance = rounding(W, X) + rounding(W, X_new)
    for rank in range(1, min(shape) + 1):
        errors = [mean_square(Y - outputs(terms, rank, X_new)) for terms in (before, after)]
        assert errors[1] <= errors[0] + tolerance


@settings(max_examples=20, deadline=None)
@given(shape=shapes, center=st.booleans(), seed=seeds, data=st.data())
def test_the_update_is_the_least_squares_of_the_dense_outputs_at_every_rank(
    shape: tuple[int, int], center: bool, seed: int, data: st.DataObject
) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    X_new = X + 0.5 * randn(*X.shape, seed=seed + 7)
    terms = solved(whitened, W, moments_of(X_new, dense=X), update="lstsq", center=center)
    seen, Y = (X_new - X_new.mean(0), (X - X.mean(0)) @ W.T) if center else (X_new, X @ W.T)
    rank = data.draw(st.integers(1, min(shape)))
    _, A, _ = terms.truncate(rank, F64)
    H = seen @ A.T
    best = mean_square(Y - H @ torch.linalg.lstsq(H, Y, driver="gelsd").solution)
    measured = mean_square(Y - seen @ product(terms, rank).T)
    tolerance = (rounding(W, X) + rounding(W, X_new)) * float(torch.linalg.cond(seen))
    assert abs(measured - best) <= tolerance
    assert abs(float(terms.losses()[rank]) + unreachable(Y, seen) - measured) <= tolerance


def test_the_update_stores_what_was_asked_and_counts_the_rest() -> None:
    W, X = randn(6, 5, seed=1), samples(5, 2)
    moments = moments_of(X + 0.5 * randn(*X.shape, seed=3), dense=X)
    some, every = (solved(whitened, W, moments, rank=rank, update="lstsq") for rank in (2, 5))
    assert some.B.shape == (6, 2)
    assert torch.allclose(some.losses(), every.losses()[:3], rtol=0, atol=2 * rounding(W, X))


def test_the_update_without_changed_inputs_changes_nothing() -> None:
    W, X = randn(6, 5, seed=1), samples(5, 2)
    plain, updated = (solved(whitened, W, moments_of(X), update=update) for update in ("none", "lstsq"))
    assert torch.equal(product(plain, 3), product(updated, 3))


def test_the_update_leaves_a_layer_that_no_input_reaches_as_it_was() -> None:
    W, X = spaced(6, 5, 1), samples(5, 2)
    moments = moments_of(X * 0, dense=X)
    terms = solved(whitened, W, moments, update="lstsq")
    assert torch.allclose(product(terms, 5), W, rtol=0, atol=64 * 11 * EPS)


def test_a_float32_weight_is_solved_in_float64() -> None:
    W, X = randn(6, 5, seed=1).float(), samples(5, 2)
    terms, exact = solved(whitened, W, moments_of(X)), solved(whitened, W.double(), moments_of(X))
    assert terms.B.dtype == torch.float32
    assert torch.equal(terms.losses(), exact.losses())
    assert torch.equal(terms.B, exact.B.float())


def test_gram_and_svd_ask_for_no_data_and_whitened_for_inputs() -> None:
    assert svd.options.needs == gram.options.needs == frozenset()
    assert whitened.options.needs == {"inputs"}
