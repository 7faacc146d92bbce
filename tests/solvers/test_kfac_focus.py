"""K-FAC's focus: a share of the inputs counts by the gradient of its token, and what is left to the model is settled."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from solver_cases import (
    DAMPING,
    F64,
    damped,
    gradients,
    moments_of,
    product,
    randn,
    ranks_of,
    rounding,
    samples,
    second_order,
    seeds,
    shapes,
    solved,
)
from torch import Tensor

from lrc.solvers import Moments, kfac


@pytest.mark.parametrize(
    ("options", "logits", "fisher", "focus"),
    [
        ({}, True, "sampled", 0.5),
        ({}, False, "outputs", 1.0),
        ({"fisher": "labels"}, False, "labels", 0.5),
        ({"fisher": "outputs"}, True, "outputs", 1.0),
        ({"focus": 0.2}, False, "outputs", 0.2),
    ],
)
def test_what_is_left_to_the_model_is_settled_by_whether_it_has_logits(
    options: dict[str, Any], logits: bool, fisher: str, focus: float
) -> None:
    made = kfac.options(**options).settled(logits=logits)
    assert (made.fisher, made.focus) == (fisher, focus)
    assert made.settled(logits=not logits) == made


@pytest.mark.parametrize(("options", "factor"), [({}, 1.5), ({"fisher": "outputs"}, 1.0), ({"modules_factor": 2}, 2.0)])
def test_narrower_modules_count_for_more_where_the_loss_is_not_quadratic(options: dict[str, Any], factor: float) -> None:
    assert kfac.options(**options).settled(logits=True).modules_factor == factor


@pytest.mark.parametrize("focus", [-0.1, 1.1, "all"])
def test_a_focus_out_of_range_is_refused(focus: float | str) -> None:
    with pytest.raises(ValidationError):
        kfac.options(focus=focus)


def weighed(X: Tensor, g: Tensor) -> Moments:
    """The moments with those of the inputs weighed by each token's squared gradient, written out."""
    share = g.square().sum(1) / g.square().sum()
    return replace(moments_of(X, g), weighted_gram=X.T @ (share[:, None] * X), weighted_mean=share @ X)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, focus=st.sampled_from([0.0, 0.5, 1.0]), center=st.booleans(), seed=seeds)
def test_a_share_of_the_inputs_counts_by_the_gradients_of_their_tokens(
    shape: tuple[int, int], focus: float, center: bool, seed: int
) -> None:
    W, X, g = randn(*shape, seed=seed), samples(shape[1], seed), gradients(shape[0], seed)
    terms = solved(kfac, W, weighed(X, g), focus=focus, center=center)
    share = (1 - focus) / len(X) + focus * g.square().sum(1) / g.square().sum()
    mean = share @ X if center else torch.zeros(shape[1], dtype=F64)
    C = damped(X.T @ (share[:, None] * X) - torch.outer(mean, mean), DAMPING)
    G = damped(moments_of(X, g).fisher, 1.0)
    for rank in ranks_of(terms):
        moment = moments_of(X).gram
        assert moment is not None
        assert abs(float(terms.losses()[rank]) - second_order(W - product(terms, rank), C, G)) <= rounding(W, C + moment, G)


def test_a_token_that_the_loss_does_not_look_at_counts_for_nothing_at_full_focus() -> None:
    W, X, g = randn(5, 4, seed=0), samples(4, 1), gradients(5, 2)
    X[:10] *= 100
    seen = g.clone()
    seen[:10] = 0
    with_them, without = solved(kfac, W, weighed(X, seen), focus=1.0), solved(kfac, W, weighed(X[10:], seen[10:]), focus=1.0)
    assert torch.allclose(product(with_them, 2), product(without, 2), rtol=1e-8, atol=1e-10)


def test_the_weighed_moment_is_the_nearest_kronecker_factor_beside_the_gradients_trace() -> None:
    """E[g gᵀ ⊗ x xᵀ] traced over its left side is E[|g|² x xᵀ]: any other C of that trace is farther along G = I."""
    X, g = samples(3, 1), gradients(2, 2)
    F = torch.stack([torch.kron(torch.outer(b, b), torch.outer(a, a)) for a, b in zip(X, g, strict=True)]).mean(0)
    C = weighed(X, g).weighted_gram
    assert C is not None
    partial = F.reshape(2, 3, 2, 3).diagonal(dim1=0, dim2=2).sum(-1)
    assert torch.allclose(partial / partial.trace(), C / C.trace())
