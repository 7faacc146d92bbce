"""Budgets in every unit: what is allocated fits, and an impossible amount is refused with one that works."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from curves import curve, several, with_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.errors import UsageError
from lrc.ranks import (
    Choice,
    FlopsKept,
    LatencyKept,
    LatencyMs,
    ParamsKept,
    RankPolicy,
    SiteCurve,
    SizeMb,
    Times,
    Unit,
    choose,
    measured_ranks,
)

REST = 1000
POLICIES: dict[Unit, Callable[[float, float], RankPolicy]] = {
    "numbers": lambda kept, whole: ParamsKept(params_kept=kept),
    "flops": lambda kept, whole: FlopsKept(flops_kept=kept),
    "bytes": lambda kept, whole: SizeMb(size_mb=(REST + kept * whole) / 1e6),
    "ms": lambda kept, whole: LatencyMs(latency_ms=kept * whole),
}
units = pytest.mark.parametrize("unit", list(POLICIES))
parts = st.floats(0.0, 1.0)


def spent(sites: list[SiteCurve], unit: Unit, choices: dict[str, Choice]) -> float:
    """What choices cost, all told; each site's share computed from its own formula."""
    total = 0.0
    for site in sites:
        choice = choices[site.name]
        if choice.rank is None:
            total += site.present(unit) + site.fixed(unit)
        else:
            total += float(site.cost(unit, choice.form, torch.tensor([choice.rank]))[0]) + site.fixed(unit)  # type: ignore[arg-type]
    return total


def whole(sites: list[SiteCurve], unit: Unit) -> float:
    return sum(site.present(unit) + site.fixed(unit) for site in sites)


def share_at(sites: list[SiteCurve], unit: Unit, part: float, round_to: int = 1) -> float:
    """A kept share: of the way from the least possible one to all, this part."""
    least = sum(float(site.candidates(unit, round_to).costs[0]) + site.fixed(unit) for site in sites) / whole(sites, unit)
    return min(1.0, (least + part * (1 - least)) * (1 + 1e-9) + (1e-6 / whole(sites, unit) if unit == "bytes" else 0))


def allocated(
    sites: list[SiteCurve], unit: Unit, kept: float, allocate: str = "global", round_to: int = 1
) -> dict[str, Choice] | None:
    policy = POLICIES[unit](kept, whole(sites, unit))
    try:
        return choose(sites, policy, allocate=allocate, round_to=round_to, rest=REST)  # type: ignore[arg-type]
    except UsageError:
        return None


def loss(sites: list[SiteCurve], choices: dict[str, Choice]) -> float:
    return sum(0.0 if (rank := choices[site.name].rank) is None else float(site.losses[rank]) for site in sites)


@units
@pytest.mark.parametrize("allocate", ["global", "uniform"])
@settings(max_examples=30, deadline=None)
@given(sites=with_costs(), part=parts, round_to=st.integers(1, 3))
def test_no_budget_is_exceeded(unit: Unit, allocate: str, sites: list[SiteCurve], part: float, round_to: int) -> None:
    kept = share_at(sites, unit, part, round_to)
    found = allocated(sites, unit, kept, allocate, round_to)
    assert found is not None
    assert spent(sites, unit, found) <= kept * whole(sites, unit) * (1 + 1e-9) + 1e-6
    for site in sites:
        choice = found[site.name]
        assert choice.rank is None or choice.rank % round_to == 0
        assert choice.rank is None or choice.form == site.form_at(choice.rank) or (unit == "ms" and site.form == "auto")


@units
@settings(max_examples=30, deadline=None)
@given(sites=with_costs(2), part=parts)
def test_global_never_loses_more_than_uniform_in_any_unit(unit: Unit, sites: list[SiteCurve], part: float) -> None:
    kept = share_at(sites, unit, part)
    shared, equal = allocated(sites, unit, kept), allocated(sites, unit, kept, "uniform")
    assert shared is not None
    assert equal is not None
    assert loss(sites, shared) <= loss(sites, equal)


@units
@settings(max_examples=20, deadline=None)
@given(sites=with_costs(2), part=parts, factor=st.sampled_from([1e-9, 3.0, 2.0**30]))
def test_scaling_all_losses_changes_no_choice_in_any_unit(
    unit: Unit, sites: list[SiteCurve], part: float, factor: float
) -> None:
    kept = share_at(sites, unit, part)
    scaled = [replace(site, losses=site.losses * factor) for site in sites]
    assert allocated(scaled, unit, kept) == allocated(sites, unit, kept)


@units
@settings(max_examples=20, deadline=None)
@given(sites=with_costs())
def test_an_impossible_amount_is_refused_with_one_that_works(unit: Unit, sites: list[SiteCurve]) -> None:
    policy = type(POLICIES[unit](1.0, 1.0))
    key = next(iter(policy.model_fields))
    with pytest.raises(UsageError, match=rf"rank\.{key}: expected at least .* \(the (smallest|fastest) ranks") as caught:
        choose(sites, policy(**{key: 1e-9}), rest=REST)
    assert caught.value.exit_code == 2
    least = float(caught.value.expected.split()[2])
    assert set(choose(sites, policy(**{key: least}), rest=REST)) == {site.name for site in sites}
    if least < 1 or unit in ("bytes", "ms"):
        with pytest.raises(UsageError):
            choose(sites, policy(**{key: 0.99 * least}), rest=REST if unit != "bytes" else int(1e6 * least))


@settings(max_examples=30, deadline=None)
@given(sites=with_costs(), part=parts, allocate=st.sampled_from(["global", "uniform"]))
def test_no_site_gets_a_rank_that_was_not_measured_to_be_faster(sites: list[SiteCurve], part: float, allocate: str) -> None:
    found = allocated(sites, "ms", share_at(sites, "ms", part), allocate)
    assert found is not None
    for site in sites:
        choice = found[site.name]
        assert site.times is not None
        if choice.rank is not None:
            assert site.times.at(choice.form, torch.tensor([choice.rank])) < site.times.present


def test_a_rank_between_measured_ones_takes_the_time_of_the_next_larger() -> None:
    times = Times(9.0, {"two_factor": {16: 3.0, 8: 2.0, 32: 5.0}})
    found = times.at("two_factor", torch.tensor([1, 8, 9, 16, 17, 32, 33]))
    assert found.tolist() == [2.0, 2.0, 3.0, 3.0, 5.0, 5.0, torch.inf]
    assert times.at("pivoted", torch.tensor([1, 2])).tolist() == [torch.inf, torch.inf]


def test_the_faster_form_is_taken_even_where_it_is_not_the_smaller_one() -> None:
    slow, fast = {8: 8.0, 16: 9.0}, {8: 3.0, 16: 5.0}
    for form, other in (("two_factor", "pivoted"), ("pivoted", "two_factor")):
        site = replace(curve(40, 40, seed=1), times=Times(10.0, {form: fast, other: slow}))
        assert choose([site], LatencyKept(latency_kept=0.6)) == {"site": Choice(16, form=form)}


def test_a_gain_within_the_noise_is_none() -> None:
    site = replace(curve(40, 40, seed=1, form="two_factor"), times=Times(10.0, {"two_factor": {8: 9.8, 4: 9.9}}))
    assert choose([site], LatencyKept(latency_kept=1.0)) == {"site": Choice(None, "no rank makes it faster")}


@pytest.mark.parametrize("round_to", [1, 3, 8, 96])
@pytest.mark.parametrize("shape", [(1, 9), (30, 20), (384, 1536), (2048, 2048)])
def test_the_measured_ranks_are_few_and_multiples_that_shrink_the_layer(shape: tuple[int, int], round_to: int) -> None:
    for form in ("two_factor", "pivoted"):
        site = curve(*shape, form=form)  # type: ignore[arg-type]
        ranks = measured_ranks(site, form, round_to)  # type: ignore[arg-type]
        assert ranks == sorted(set(ranks))
        assert len(ranks) <= 14
        assert all(rank % round_to == 0 and site.size(rank) < site.dense_size for rank in ranks)
        possible = [rank for rank in range(round_to, site.full_rank + 1, round_to) if site.size(rank) < site.dense_size]
        assert bool(ranks) == bool(possible)


def test_a_site_that_sees_few_rows_costs_few_flops_and_keeps_its_rank() -> None:
    """Of two equal sites, the one that sees a sixteenth of the rows is cheap to leave as it is."""
    tokens = replace(curve(32, 32, seed=1, name="tokens"), rows=16.0)
    pooled = replace(curve(32, 32, seed=1, name="pooled"), rows=1.0)
    found = choose([tokens, pooled], FlopsKept(flops_kept=0.5))
    assert found["pooled"].rank is None
    assert found["tokens"].rank is not None
    by_number = choose([tokens, pooled], ParamsKept(params_kept=0.5))
    assert by_number["pooled"].rank == by_number["tokens"].rank


def test_the_rest_of_the_model_and_index_vectors_count_in_a_size() -> None:
    site = replace(curve(40, 40, seed=1), index=40.0, itemsize=4)
    for rest in (0, 700):
        found = choose([site], SizeMb(size_mb=(rest + 4 * 40 * 20) / 1e6), rest=rest)
        rank = found["site"].rank
        assert rank is not None
        stored = [4 * r * (80 - r) + 4 * 40 for r in (rank, rank + 1)]
        assert stored[0] <= 4 * 40 * 20 < stored[1]


def test_a_weight_that_something_else_goes_on_reading_is_left_alone_by_a_size() -> None:
    """Factors beside a weight that stays would add bytes."""
    sites = [replace(curve(20, 20, name="tied"), now={"bytes": 0}), curve(20, 20, seed=2, name="free")]
    found = choose(sites, SizeMb(size_mb=(REST + 1000) / 1e6), rest=REST)
    assert found["tied"] == Choice(None, "no rank makes it smaller")
    assert found["free"].rank is not None


@settings(max_examples=20, deadline=None)
@given(sites=several(2), part=parts)
def test_equal_rows_make_flops_of_unbiased_sites_a_budget_of_numbers(sites: list[SiteCurve], part: float) -> None:
    bare = [replace(site, bias=0, extra=0, rows=7.0) for site in sites]
    kept = share_at(bare, "numbers", part)
    by_flops, by_numbers = allocated(bare, "flops", kept), allocated(bare, "numbers", kept)
    assert by_flops is not None
    assert by_numbers is not None
    assert {name: choice.rank for name, choice in by_flops.items()} == {n: choice.rank for n, choice in by_numbers.items()}


@pytest.mark.parametrize(("noise", "largest"), [(0.0, 9), (0.02, 9), (0.25, 7), (0.55, 4), (1.0, 0)])
def test_a_product_is_offered_where_its_gain_is_beyond_the_noise(noise: float, largest: int) -> None:
    times = Times(1.0, {"two_factor": {rank: rank / 10 for rank in range(1, 13)}}, noise)
    site = replace(curve(40, 30, form="two_factor"), times=times)
    assert max(site.candidates("ms").ranks, default=0) == largest
