"""A budget over all sites: never exceeded, spent where it saves most loss, and refused where it cannot be met."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from curves import curve, dense_numbers, from_spectrum, least_loss, loss, numbers, options_of, order, several
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrc.errors import UsageError
from lrc.ranks import Choice, ParamsKept, SiteCurve, choose

PIVOTED = Choice(2, form="pivoted")
kept_shares = st.floats(0.2, 1.0)


def allocated(sites: list[SiteCurve], kept: float, allocate: str = "global", round_to: int = 1) -> dict[str, Choice] | None:
    """The choices, or None where the budget was refused."""
    try:
        return choose(sites, ParamsKept(params_kept=kept), allocate=allocate, round_to=round_to)
    except UsageError:
        return None


@pytest.mark.parametrize("allocate", ["global", "uniform", "auto"])
@settings(max_examples=30, deadline=None)
@given(sites=several(), kept=st.floats(0.01, 1.0), round_to=st.integers(1, 3))
def test_a_budget_is_never_exceeded_and_refused_only_where_nothing_fits(
    allocate: str, sites: list[SiteCurve], kept: float, round_to: int
) -> None:
    found = allocated(sites, kept, allocate, round_to)
    smallest = sum(site.bias + min(size for _, size, _ in options_of(site, round_to)) for site in sites)
    assert (found is None) == (smallest > kept * dense_numbers(sites) + 1e-6)
    if found is not None:
        assert numbers(sites, found) <= kept * dense_numbers(sites) + 1e-6


@settings(max_examples=30, deadline=None)
@given(sites=several(2), kept=kept_shares, round_to=st.integers(1, 3))
def test_global_never_predicts_a_higher_loss_than_uniform(sites: list[SiteCurve], kept: float, round_to: int) -> None:
    shared, equal = allocated(sites, kept, "global", round_to), allocated(sites, kept, "uniform", round_to)
    assume(shared is not None)
    assert equal is not None
    assert loss(sites, shared) <= loss(sites, equal)


def test_where_the_budget_cuts_the_relaxation_badly_the_uniform_choice_is_taken() -> None:
    """Without the comparison, the one step that the budget lets through would go to the wrong site."""
    sites = [
        curve(3, 3, seed=162, decay=0.0, form="two_factor", name="0"),
        curve(5, 5, seed=825, decay=0.5, form="two_factor", name="1"),
    ]
    equal = allocated(sites, 0.8, "uniform")
    assert equal is not None
    assert [choice.rank for choice in equal.values()] == [1, 2]
    assert allocated(sites, 0.8, "global") == equal
    assert loss(sites, equal) == pytest.approx(least_loss(sites, 0.8), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(sites=several(), kept=kept_shares, round_to=st.integers(1, 4), allocate=st.sampled_from(["global", "uniform"]))
def test_every_chosen_rank_shrinks_its_layer_in_steps_of_round_to(
    sites: list[SiteCurve], kept: float, round_to: int, allocate: str
) -> None:
    found = allocated(sites, kept, allocate, round_to)
    assume(found is not None)
    for site in sites:
        rank, reason = found[site.name].rank, found[site.name].reason
        possible = [r for r, _, _ in options_of(site, round_to)]
        assert rank in possible
        assert bool(reason) == (rank is None)
        assert ("no rank makes it smaller" in reason) == (possible == [None])


@settings(max_examples=30, deadline=None)
@given(sites=several(2), kept=kept_shares, factor=st.sampled_from([1e-12, 0.1, 3.0, 2.0**40]))
def test_scaling_all_losses_changes_no_rank(sites: list[SiteCurve], kept: float, factor: float) -> None:
    scaled = [replace(site, losses=site.losses * factor) for site in sites]
    assert allocated(scaled, kept) == allocated(sites, kept)


@settings(max_examples=30, deadline=None)
@given(sites=several(2), kept=kept_shares)
def test_scaling_the_loss_of_one_site_moves_rank_towards_it(sites: list[SiteCurve], kept: float) -> None:
    before = allocated(sites, kept)
    assume(before is not None)
    first = sites[0]
    after = allocated([replace(first, losses=first.losses * 100), *sites[1:]], kept)
    assert after is not None
    assert order(first, after[first.name]) >= order(first, before[first.name])


def test_of_two_equal_sites_the_one_with_a_hundred_times_the_loss_gets_the_ranks() -> None:
    sites = [curve(24, 24, seed=1, decay=0.5, name="a"), curve(24, 24, seed=1, decay=0.5, name="b")]
    before = allocated(sites, 0.5)
    after = allocated([sites[0], replace(sites[1], losses=sites[1].losses * 100)], 0.5)
    assert before is not None
    assert after is not None
    assert abs(order(sites[0], before["a"]) - order(sites[1], before["b"])) <= 1
    assert order(sites[1], after["b"]) >= order(sites[1], before["b"]) + 5
    assert order(sites[0], after["a"]) <= order(sites[0], before["a"]) - 5


def test_uniform_gives_every_site_its_share() -> None:
    sites = [curve(20, 10, seed=1, name="a", scale=100.0), curve(10, 30, seed=2, name="b"), curve(16, 16, seed=3, name="c")]
    found = allocated(sites, 0.6, "uniform")
    assert found is not None
    for site in sites:
        rank = found[site.name].rank
        assert rank is not None
        assert site.size(rank) <= 0.6 * site.dense_size < site.size(rank + 1)


def test_uniform_takes_from_the_others_what_a_site_without_a_small_choice_needs() -> None:
    sites = [curve(1, 40, name="row"), curve(10, 10, name="a"), curve(10, 10, name="b")]
    found = allocated(sites, 0.5, "uniform")
    assert found == {"row": Choice(None, "no rank makes it smaller"), "a": PIVOTED, "b": PIVOTED}
    assert numbers(sites, found) == 40 + 2 * 36 <= 0.5 * dense_numbers(sites)


def test_the_whole_budget_leaves_everything_dense_that_has_a_loss() -> None:
    sites = [curve(8, 6, name="a"), curve(5, 9, name="b")]
    for allocate in ("global", "uniform"):
        found = allocated(sites, 1.0, allocate)
        assert found is not None
        assert [choice.rank for choice in found.values()] == [None, None]
        assert all("dense" in choice.reason for choice in found.values())


def test_a_site_without_any_loss_gives_its_numbers_to_the_others() -> None:
    sites = [from_spectrum(12, 12, torch.zeros(12), name="zero"), curve(12, 12, seed=2, decay=0.0, name="full")]
    found = allocated(sites, 0.5)
    assert found is not None
    assert found["zero"] == Choice(1, form="pivoted")
    assert order(sites[1], found["full"]) >= 7


def test_biases_count_in_the_budget_and_stay() -> None:
    bare = [curve(10, 10, seed=1, name="a"), curve(10, 10, seed=2, name="b")]
    with_bias = [replace(site, bias=10) for site in bare]
    for allocate in ("global", "uniform"):
        found = allocated(with_bias, 0.5, allocate)
        assert found is not None
        assert numbers(with_bias, found) <= 0.5 * 220
        assert sum(site.size(found[site.name].rank or 10) for site in bare) <= 110 - 20


def test_auto_is_global_only_where_losses_may_be_compared() -> None:
    sites = [curve(20, 10, seed=1, name="a", scale=100.0), curve(10, 30, seed=2, name="b")]
    apart = [replace(site, additive=False) for site in sites]
    assert allocated(sites, 0.5, "auto") == allocated(sites, 0.5, "global") != allocated(sites, 0.5, "uniform")
    assert allocated(apart, 0.5, "auto") == allocated(sites, 0.5, "uniform")


@settings(max_examples=30, deadline=None)
@given(sites=several(), allocate=st.sampled_from(["global", "uniform"]))
def test_an_impossible_budget_is_refused_with_one_that_works(sites: list[SiteCurve], allocate: str) -> None:
    with pytest.raises(UsageError, match=r"rank.params_kept: expected at least [\d.]+ .*, got 0.0005") as caught:
        choose(sites, ParamsKept(params_kept=5e-4), allocate=allocate)
    assert caught.value.exit_code == 2
    least = float(caught.value.expected.split()[2])
    assert allocated(sites, least, allocate) is not None
    assert allocated(sites, least - 2e-4, allocate) is None


def test_no_sites_need_no_ranks() -> None:
    for allocate in ("global", "uniform", "auto"):
        assert choose([], ParamsKept(params_kept=0.5), allocate=allocate) == {}


@settings(max_examples=20, deadline=None)
@given(sites=several(2), kept=kept_shares)
def test_global_is_within_one_step_of_the_least_loss(sites: list[SiteCurve], kept: float) -> None:
    """The Lagrange relaxation misses the optimum by less than the one step of a site's hull that the budget cuts."""
    found = allocated(sites, kept)
    best = least_loss(sites, kept)
    assume(found is not None and best is not None)
    rounding = 1e-6 * max(float(site.losses[0]) for site in sites)  # the feasibility tolerance of HiGHS
    assert loss(sites, found) >= best - rounding
    assert loss(sites, found) <= best + max(largest_hull_step(site) for site in sites) + rounding


def largest_hull_step(site: SiteCurve) -> float:
    """The largest fall of loss between two neighbours on the lower hull of (size, loss)."""
    hull: list[tuple[float, float]] = []
    for _, size, value in options_of(site):
        while len(hull) > 1 and slope(hull[-2], (size, value)) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((size, value))
    return max((a[1] - b[1] for a, b in pairwise(hull)), default=0.0)


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else math.inf


def test_global_loses_little_to_the_exact_optimum_on_smooth_spectra() -> None:
    total, best = 0.0, 0.0
    exact = 0
    for case in range(24):
        form, decays = ("auto", "two_factor")[case % 2], (0.3, 1.0, 2.0)
        sites = [
            curve(8 + 2 * i, 20 - i, seed=9 * case + i, decay=decays[(case + i) % 3], form=form, name=str(i), scale=10.0**i)
            for i in range(4)
        ]
        kept = 0.3 + 0.025 * case
        found, least = allocated(sites, kept), least_loss(sites, kept)
        assert found is not None
        assert least is not None
        assert loss(sites, found) >= least * (1 - 1e-6)
        exact += loss(sites, found) <= least * (1 + 1e-6)
        total, best = total + loss(sites, found), best + least
    assert exact >= 12
    assert total <= 1.02 * best
