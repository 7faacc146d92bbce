"""Atomic feature mimicking and LoRD: principal components of a layer's outputs, with their mean in the bias."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    EPS,
    F64,
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

from lrc.maps import Chain
from lrc.solvers import Moments, afm, lord, svd, whitened
from lrc.solvers.ladder import FLOOR
from lrc.spec.registry import Rule

both = pytest.mark.parametrize("rule", [afm, lord], ids=["afm", "lord"])
Solver = Rule[Any, Any]


def rounding(W: Tensor, X: Tensor, bias: Tensor | None = None) -> float:
    """What rounding may add to a mean squared error of outputs, and the floor under small eigenvalues."""
    squares = W.square().sum() * X.square().sum(1).mean() + (0 if bias is None else bias.square().sum())
    return (64 * (sum(W.shape) + len(X)) * EPS + FLOOR) * float(squares)


@both
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_same_outputs_for_any_input(rule: Solver, shape: tuple[int, int], center: bool) -> None:
    W, X, b = randn(*shape, seed=1), samples(shape[1], 2), randn(shape[0], seed=3)
    terms = solved(rule, W, moments_of(X), b, center=center)
    x = 10 * randn(7, shape[1], seed=4)
    tolerance = 64 * sum(shape) * EPS * float(W.norm() * (x.norm(dim=1).max() + X.norm(dim=1).max()) + b.norm())
    assert float((outputs(terms, min(shape), x) - (x @ W.T + b)).abs().max()) <= tolerance


@both
@settings(max_examples=30, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, bias=st.booleans(), seed=seeds)
def test_the_error_is_the_sum_of_the_discarded_eigenvalues(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, bias: bool, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    b = randn(shape[0], seed=seed + 9) if bias else None
    Y = X @ W.T + (0 if b is None else b)
    terms = solved(rule, W, moments_of(X), b)
    assert terms.unit == "squared output error per token"
    e = torch.linalg.eigvalsh(torch.cov(Y.T, correction=0).reshape(shape[0], shape[0])).flip(0)
    for rank in ranks_of(terms):
        discarded = float(e[rank:].sum())
        assert abs(mean_square(outputs(terms, rank, X) - Y) - discarded) <= rounding(W, X, b)
        assert abs(float(terms.losses()[rank]) - discarded) <= rounding(W, X, b)


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, seed=seeds)
def test_the_mean_output_is_kept_at_every_rank_and_is_all_that_rank_zero_gives(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, seed: int
) -> None:
    W, X, b = weight_of(shape, seed, weight), samples(shape[1], seed, data), randn(shape[0], seed=seed + 9)
    terms = solved(rule, W, moments_of(X), b)
    mean = (X @ W.T + b).mean(0)
    tolerance = 64 * (sum(shape) + len(X)) * EPS * float(W.norm() * X.norm(dim=1).max() + b.norm())
    for rank in ranks_of(terms):
        assert float((outputs(terms, rank, X).mean(0) - mean).norm()) <= tolerance
    assert float((outputs(terms, 0, X) - mean).abs().max()) <= tolerance


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_without_centring_it_is_whitened_svd(rule: Solver, shape: tuple[int, int], seed: int) -> None:
    W, X = randn(*shape, seed=seed), samples(shape[1], seed)
    terms, other = solved(rule, W, moments_of(X), center=False), solved(whitened, W, moments_of(X))
    condition = float(torch.linalg.cond(X))
    assert terms.mean is None
    assert torch.allclose(terms.losses(), other.losses(), rtol=0, atol=rounding(W, X))
    for rank in ranks_of(terms):
        tolerance = condition * product_error(other.S, rank, sum(shape), float(W.norm()))
        assert float((product(terms, rank) - product(other, rank)).norm()) <= tolerance


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, bias=st.booleans(), seed=seeds)
def test_centring_never_raises_the_error_and_errors_fall_with_rank(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, bias: bool, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    b = randn(shape[0], seed=seed + 9) if bias else None
    Y = X @ W.T + (0 if b is None else b)
    centred, plain = (solved(rule, W, moments_of(X), b, center=center) for center in (True, False))
    for terms in (centred, plain):
        errors = [mean_square(outputs(terms, rank, X) - Y) for rank in ranks_of(terms)]
        assert all(later <= earlier + rounding(W, X, b) for earlier, later in pairwise(errors))
        assert (terms.losses()[1:] <= terms.losses()[:-1]).all()
    for rank in ranks_of(centred):
        errors = [mean_square(outputs(terms, rank, X) - Y) for terms in (centred, plain)]
        assert errors[0] <= errors[1] + rounding(W, X, b)


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, data=inputs, seed=seeds)
def test_no_affine_map_of_that_rank_of_the_outputs_does_better(
    rule: Solver, shape: tuple[int, int], data: str, seed: int
) -> None:
    W, X, b = randn(*shape, seed=seed), samples(shape[1], seed, data), randn(shape[0], seed=seed + 9)
    Y = X @ W.T + b
    terms, plain = solved(rule, W, moments_of(X), b), solved(svd, W, bias=b)
    for rank in ranks_of(terms):
        ours = mean_square(outputs(terms, rank, X) - Y)
        Q = orthogonal(shape[0], seed + rank)[:, :rank]
        from_svd = X @ product(plain, rank).T
        rivals = [
            (Y - Y.mean(0)) @ Q @ Q.T + Y.mean(0),
            Y @ Q @ Q.T,
            from_svd + b,
            from_svd + (Y - from_svd).mean(0),
        ]
        for rival in rivals:
            assert ours <= mean_square(rival - Y) + rounding(W, X, b)


@both
@settings(max_examples=20, deadline=None)
@given(shape=shapes, weight=weights, data=inputs, center=st.booleans(), seed=seeds)
def test_the_second_factor_is_orthonormal_and_gives_the_first(
    rule: Solver, shape: tuple[int, int], weight: str, data: str, center: bool, seed: int
) -> None:
    W, X = weight_of(shape, seed, weight), samples(shape[1], seed, data)
    terms = solved(rule, W, moments_of(X), center=center)
    for rank in range(1, min(shape) + 1):
        B, A, _ = terms.truncate(rank, F64)
        assert float((B.T @ B - torch.eye(rank, dtype=F64)).norm()) <= 32 * sum(shape) * EPS
        assert float((A - B.T @ W).norm()) <= 32 * sum(shape) * EPS * float(W.norm())


@both
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds)
def test_isotropic_inputs_without_centring_give_plain_svd(rule: Solver, shape: tuple[int, int], seed: int) -> None:
    W = spaced(*shape, seed)
    moments = Moments(gram=torch.eye(shape[1], dtype=F64), mean=torch.zeros(shape[1], dtype=F64))
    terms, plain = solved(rule, W, moments, center=False), solved(svd, W)
    for rank in ranks_of(terms):
        difference = float((product(terms, rank) - product(plain, rank)).norm())
        assert difference <= product_error(plain.S, rank, max(shape), float(W.norm()))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chain_and_the_merged_layer_agree(rule: Solver, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W, X, b = randn(*shape, seed=1), samples(shape[1], 2), randn(shape[0], seed=3)
    B, A, bias = solved(rule, W, moments_of(X), b).truncate(max(1, min(shape) // 2), dtype)
    chain = Chain(B, A, bias=bias)
    merged = chain.dense()
    x = randn(9, shape[1], seed=4, dtype=dtype)
    assert merged.bias is not None
    norms = float(B.norm() * A.norm() * x.norm() + merged.bias.norm())
    difference = (chain(x).detach() - torch.nn.functional.linear(x, *merged)).abs().max()
    assert float(difference) <= 8 * sum(shape) * torch.finfo(dtype).eps * norms


@both
def test_centring_adds_a_bias_to_a_layer_that_has_none_and_only_then(rule: Solver) -> None:
    W, X = randn(5, 4, seed=1), samples(4, 2)
    assert solved(rule, W, moments_of(X)).truncate(2, F64).bias is not None
    assert solved(rule, W, moments_of(X), center=False).truncate(2, F64).bias is None


@both
def test_a_large_mean_does_not_hide_the_spread(rule: Solver) -> None:
    W, X = randn(5, 4, seed=1), samples(4, 2)
    X = X - X.mean(0)
    far = X + 1e4
    near, shifted = solved(rule, W, moments_of(X)), solved(rule, W, moments_of(far))
    lost = 64 * len(X) * EPS * float(W.square().sum()) * float(far.square().sum(1).mean())
    assert torch.allclose(near.losses(), shifted.losses(), rtol=0, atol=lost)
    assert lost < 1e-3 * float(near.losses()[0])


def read(counts: Tensor) -> Moments:
    """The moments of the one-hot vectors of a table whose rows are read that often."""
    share = counts.double() / counts.sum()
    return Moments(gram=share, mean=share, tokens=int(counts.sum()))


def test_rows_that_are_read_alike_lose_the_tail_of_the_centred_table() -> None:
    table = randn(5, 40, seed=1) + 3  # transposed, as solvers see it
    terms = solved(afm, table, read(torch.full((40,), 7)))
    mean = table.mean(1, keepdim=True)
    U, S, Vh = torch.linalg.svd(table - mean, full_matrices=False)
    for rank in range(1, 6):
        tail = float(S[rank:].square().sum()) / 40
        assert float(terms.losses()[rank]) == pytest.approx(tail, rel=1e-6, abs=1e-12)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank] + mean
        assert torch.allclose(outputs(terms, rank, torch.eye(40, dtype=F64)).T, best, atol=1e-9)


def test_a_prior_looks_at_rows_that_the_data_never_reads() -> None:
    table = randn(6, 40, seed=2)
    table[:3, 20:] *= 0.1
    table[3:, :20] *= 0.1  # the rows that are never read lie in other directions
    counts = torch.cat([torch.randint(1, 50, (20,), generator=torch.Generator().manual_seed(3)), torch.zeros(20)])

    def errors(prior: float) -> tuple[float, float]:
        terms = solved(afm, table, read(counts), prior=prior)
        rest = outputs(terms, 3, torch.eye(40, dtype=F64)).T - table
        return float(rest[:, :20].norm()), float(rest[:, 20:].norm())

    plain, some, alike = errors(0.0), errors(1.0), errors(1e9)
    assert plain[0] < some[0]
    assert some[1] < 0.8 * plain[1]
    uniform = solved(afm, table, read(torch.ones(40)))
    rest = outputs(uniform, 3, torch.eye(40, dtype=F64)).T - table
    assert alike == pytest.approx((float(rest[:, :20].norm()), float(rest[:, 20:].norm())), rel=1e-6)
    X = samples(7, 4)
    W = randn(5, 7, seed=5)
    same = [solved(afm, W, moments_of(X), prior=prior) for prior in (0.0, 3.0)]
    assert torch.equal(same[0].B, same[1].B)  # of a table alone


def test_lord_is_afm_under_its_own_name() -> None:
    W, X = randn(5, 4, seed=1), samples(4, 2)
    assert (afm.name, lord.name) == ("afm", "lord")
    assert torch.equal(product(solved(afm, W, moments_of(X)), 2), product(solved(lord, W, moments_of(X)), 2))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_singular_statistics_are_told_in_the_notes(shape: tuple[int, int]) -> None:
    W, X = randn(*shape, seed=1), samples(shape[1], 2, "few")
    kept = len(X) - 1  # the mean takes one direction
    expected = f"gram is singular (rank {kept} of {shape[1]}): eigh with floor 1e-10"
    few = "gram is zero: calibration does not reach this layer, and its errors are not weighed"
    assert solved(afm, W, moments_of(X)).notes == ((expected,) if kept else (few,))
    assert solved(afm, W, moments_of(samples(shape[1], 2))).notes == ()
