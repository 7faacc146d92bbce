"""What every solver refuses, before any arithmetic, with the name of what is wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from solver_cases import F64, generator, moments_of, randn, samples, solved, with_samples
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers import Moments, afm, asvd, fwsvd, gram, kfac, lord, nmf, random_init, snmf, svd, whitened
from lrc.spec.registry import Rule

Solver = Rule[Any, Any]
NESTED = [svd, gram, whitened, afm, lord, kfac, asvd, fwsvd]
SOLVERS = [*NESTED, snmf, nmf, random_init]
each = pytest.mark.parametrize("rule", SOLVERS, ids=lambda rule: rule.name)
with_inputs = pytest.mark.parametrize("rule", [whitened, afm, lord, kfac], ids=lambda rule: rule.name)

W = randn(5, 4, seed=0).abs()
MOMENTS = with_samples(moments_of(samples(4, 1), samples(5, 2)), samples(4, 1), samples(5, 2))


def damaged(tensor: Tensor, *values: float) -> Tensor:
    made = tensor.clone()
    for i, value in enumerate(values):
        made.view(-1)[i] = value
    return made


@each
def test_weights_that_are_not_finite_are_refused_with_their_count(rule: Solver) -> None:
    nan, inf = float("nan"), float("inf")
    wanted = r"weight: expected finite numbers, got 2 NaN and 1 infinite of 20 values. The checkpoint is damaged"
    with pytest.raises(SolverError, match=wanted):
        solved(rule, damaged(W, nan, -inf, nan), MOMENTS)
    with pytest.raises(SolverError, match="got 0 NaN and 1 infinite of 20"):
        solved(rule, damaged(W, inf).half(), MOMENTS)


@each
def test_a_bias_that_is_not_finite_or_does_not_fit_is_refused(rule: Solver) -> None:
    with pytest.raises(SolverError, match="bias: expected finite numbers, got 1 NaN and 0 infinite of 5 values"):
        solved(rule, W, MOMENTS, damaged(randn(5, seed=1), float("nan")))
    with pytest.raises(SolverError, match=r"bias: expected shape \(5,\), got shape \(4,\)"):
        solved(rule, W, MOMENTS, randn(4, seed=1))


@each
@pytest.mark.parametrize("shape", [(5,), (5, 4, 2), (0, 4), (5, 0)])
def test_what_is_no_matrix_with_rows_and_columns_is_refused(rule: Solver, shape: tuple[int, ...]) -> None:
    with pytest.raises(SolverError, match=r"weight: expected a matrix with rows and columns, got shape"):
        rule(torch.zeros(shape), None, MOMENTS, 1, rule.options(), generator(0))


@each
def test_no_rank_at_all_is_refused(rule: Solver) -> None:
    with pytest.raises(SolverError, match="max_rank: expected at least 1, got 0"):
        rule(W, None, MOMENTS, 0, rule.options(), generator(0))


@with_inputs
def test_missing_inputs_are_refused_with_the_way_out(rule: Solver) -> None:
    wanted = r"moments.gram: expected the inputs that this solver needs, got none. Give `calibration` data, or choose .*`svd`"
    with pytest.raises(SolverError, match=wanted):
        solved(rule, W, replace(MOMENTS, gram=None))


def test_missing_gradients_are_refused_by_kfac() -> None:
    with pytest.raises(SolverError, match=r"moments.fisher: expected the gradients that this solver needs, got none"):
        solved(kfac, W, replace(MOMENTS, fisher=None))


@with_inputs
def test_a_missing_mean_is_refused_only_where_it_is_needed(rule: Solver) -> None:
    moments = replace(MOMENTS, mean=None)
    with pytest.raises(SolverError, match=r"moments.mean: expected the mean input, got none. Set `center: false`"):
        solved(rule, W, moments, center=True)
    assert solved(rule, W, moments, center=False).mean is None


@each
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gram", (5, 5)), ("gram", (5,)), ("mean", (5,)), ("fisher", (4, 4)), ("cross", (4, 5)), ("dense_mean", (1, 4)),
        ("weight_fisher", (4, 5)), ("magnitudes", (5,)),
    ],
)  # fmt: skip
def test_a_statistic_of_another_shape_is_refused_by_name(rule: Solver, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SolverError, match=rf"moments.{name}: expected shape \(.*\), got shape \({shape[0]}"):
        solved(rule, W, replace(MOMENTS, **{name: torch.zeros(shape, dtype=F64)}))


@each
@pytest.mark.parametrize("name", ["gram", "mean", "fisher", "cross", "dense_mean", "weight_fisher", "magnitudes"])
def test_a_statistic_that_is_not_finite_is_refused_by_name(rule: Solver, name: str) -> None:
    given = {"gram": MOMENTS.gram, "mean": MOMENTS.mean, "fisher": MOMENTS.fisher, "cross": MOMENTS.gram}
    given["weight_fisher"] = MOMENTS.weight_fisher
    tensor = given.get(name, MOMENTS.mean)
    assert tensor is not None
    moments = replace(MOMENTS, **{name: damaged(tensor, float("nan"))})
    with pytest.raises(SolverError, match=rf"moments.{name}: expected finite numbers, got 1 NaN and 0 infinite of"):
        solved(rule, W, moments)


@each
def test_a_refusal_is_a_failure_and_no_mistake_of_usage(rule: Solver) -> None:
    with pytest.raises(SolverError) as caught:
        solved(rule, damaged(W, float("nan")), MOMENTS)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("rule", [svd, gram], ids=lambda rule: rule.name)
def test_solvers_of_the_weight_alone_need_no_moments(rule: Solver) -> None:
    assert solved(rule, W, Moments()).S.shape == (4,)


@pytest.mark.parametrize("rule", NESTED, ids=lambda rule: rule.name)
def test_one_row_one_column_and_one_number_are_solved(rule: Solver) -> None:
    for m, n in ((1, 6), (6, 1), (1, 1)):
        weight = randn(m, n, seed=3)
        X, g = samples(n, 1), samples(m, 2)
        terms = solved(rule, weight, with_samples(moments_of(X, g), X, g))
        B, A, _ = terms.truncate(1, F64)
        assert torch.allclose(B @ A, weight, rtol=1e-8, atol=0)
