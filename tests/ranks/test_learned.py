"""Learned truncation on numbers alone: the mask, the budget that every step keeps, and the rounding to whole ranks."""

import numpy as np
import pytest
import torch
from curves import several, with_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.errors import UsageError
from lrc.ranks import Allocation, Candidates, FlopsKept, LatencyKept, ParamsKept, RankPolicy, SiteCurve, SizeMb, allocate_ranks
from lrc.ranks.candidates import Budget, total_cost
from lrc.ranks.learned import Course, along, fitted, mask, places, positions_of

F64 = torch.float64


def at(position: float) -> torch.Tensor:
    return torch.tensor(position, dtype=F64)


@given(count=st.integers(1, 40), part=st.floats(0, 1), width=st.floats(0.01, 4))
def test_a_mask_falls_from_one_to_zero_and_is_half_way_at_its_position(count: int, part: float, width: float) -> None:
    position = 1 + part * (count - 1)
    kept = mask(at(position), count, width)
    assert bool((kept.diff() <= 0).all())
    assert bool(((kept >= 0) & (kept <= 1)).all())
    inside = torch.arange(1, count + 1) <= position + 0.5
    assert bool((kept[inside] >= 0.5).all())
    assert bool((kept[~inside] <= 0.5).all())


@pytest.mark.parametrize("width", [0.1, 1.0, 10.0])
def test_a_position_at_the_last_term_keeps_all_of_them(width: float) -> None:
    assert float((1 - mask(at(24.0), 24, width)).max()) <= 5e-5


def test_a_narrow_mask_is_the_truncation_itself() -> None:
    assert torch.allclose(mask(at(3.0), 6, 1e-3), torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=F64))


def test_the_derivative_of_a_mask_is_that_of_the_tanh_in_the_paper() -> None:
    position = torch.tensor(4.0, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(mask(position, 12, 0.7).sum(), position)
    beta = 1 / (2 * 0.7)
    terms = torch.arange(1, 13, dtype=F64)
    assert float(found) == pytest.approx(float((0.5 * beta / torch.cosh(beta * (4.5 - terms)) ** 2).sum()), rel=1e-12)


def menu(curve: SiteCurve) -> tuple[Candidates, Course]:
    site = curve.candidates("numbers")
    return site, Course.of(site, curve.full_rank)


@settings(max_examples=60, deadline=None)
@given(curves=several(), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_positions_put_on_the_budget_cost_no_more_and_all_of_it_where_they_can(
    curves: list[SiteCurve], part: float, seed: int
) -> None:
    sites, courses = map(list, zip(*map(menu, curves), strict=True))
    least, whole = total_cost(sites, [0] * len(sites)), sum(float(site.costs[-1]) for site in sites)
    amount = least + part * (whole - least)
    shares = fitted(courses, np.random.default_rng(seed).uniform(0, 1, len(sites)), amount)
    spent = sum(course.cost(share * course.bounds[1]) for course, share in zip(courses, shares, strict=True))
    assert spent <= amount * (1 + 1e-12)
    assert spent >= amount - 1e-6 * whole
    chosen = places(sites, courses, shares, Budget(amount, 1.0))
    assert total_cost(sites, chosen) <= amount
    # No room is left for the next candidate of any site that was rounded down.
    left = amount - total_cost(sites, chosen)
    for site, course, share, i in zip(sites, courses, shares, chosen, strict=True):
        if i < len(site.ranks) and site.ranks[i] <= share * course.bounds[1] + 1e-9:
            assert float(site.costs[i + 1] - site.costs[i]) > left


@given(curves=several(), part=st.floats(0, 1))
def test_whole_ranks_are_what_they_are_rounded_to(curves: list[SiteCurve], part: float) -> None:
    sites, courses = map(list, zip(*map(menu, curves), strict=True))
    chosen = [round(part * len(site.ranks)) for site in sites]
    shares = positions_of(sites, courses, chosen)
    assert places(sites, courses, shares, Budget(total_cost(sites, chosen), 1.0)) == chosen


@settings(max_examples=60, deadline=None)
@given(curves=several(), seed=st.integers(0, 99))
def test_a_step_along_the_budget_costs_nothing_and_still_goes_down(curves: list[SiteCurve], seed: int) -> None:
    _, courses = map(list, zip(*map(menu, curves), strict=True))
    draw = np.random.default_rng(seed)
    shares, gradient = fitted(courses, draw.uniform(0, 1, len(courses)), 1e9), draw.normal(size=len(courses))
    shares = np.array(
        [(course.bounds[0] / course.bounds[1] + share) / 2 for course, share in zip(courses, shares, strict=True)]
    )
    step = along(courses, shares, gradient)
    slopes = np.array([c.slope(s * c.bounds[1]) * c.bounds[1] for c, s in zip(courses, shares, strict=True)])
    assert abs(step @ slopes) <= 1e-9 * (1 + np.abs(step) @ np.abs(slopes))
    assert step @ gradient >= -1e-12


BUDGETS: list[RankPolicy] = [ParamsKept(params_kept=0.5), SizeMb(size_mb=0.001), FlopsKept(flops_kept=0.5)]


@pytest.mark.parametrize(
    "policy", [*BUDGETS, LatencyKept(latency_kept=0.6)], ids=lambda policy: next(iter(type(policy).model_fields))
)
@settings(max_examples=25, deadline=None)
@given(curves=with_costs(), round_to=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_every_linear_budget_is_met_wherever_training_ends(
    policy: RankPolicy, curves: list[SiteCurve], round_to: int, seed: int
) -> None:
    asked: list[float] = []

    def search(sites: list[Candidates], budget: Budget, start: list[int]) -> tuple[list[int], tuple[str, ...]]:
        courses = [Course.of(site, curve.full_rank) for site, curve in zip(sites, curves, strict=True)]
        shares = fitted(courses, np.random.default_rng(seed).uniform(0, 1, len(sites)), budget.amount)
        chosen = places(sites, courses, shares, budget)
        assert total_cost(sites, chosen) <= budget.amount
        assert all(site.ranks[i] % round_to == 0 for site, i in zip(sites, chosen, strict=True) if i < len(site.ranks))
        asked.append(budget.amount)
        return chosen, ("learned",)

    try:
        found: Allocation = allocate_ranks(curves, policy, round_to=round_to, search=search)  # type: ignore[arg-type]
    except UsageError:  # not even the smallest ranks fit
        return
    assert len(asked) == 1
    assert found.notes == ("learned",)
