"""Budgets in every unit: what is allocated fits, and an impossible amount is refused with one that works."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from curves import curve, several, with_costs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrc.errors import UsageError
from lrc.ranks import Choice, FlopsKept, ParamsKept, RankPolicy, SiteCurve, SizeMb, Unit, choose

REST = 1000
POLICIES: dict[Unit, Callable[[float, float], RankPolicy]] = {
    "numbers": lambda kept, whole: ParamsKept(params_kept=kept),
    "flops": lambda kept, whole: FlopsKept(flops_kept=kept),
    "bytes": lambda kept, whole: SizeMb(size_mb=(REST + kept * whole) / 1e6),
}
units = pytest.mark.parametrize("unit", list(POLICIES))
shares = st.floats(0.05, 1.0)


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
@given(sites=with_costs(), kept=shares, round_to=st.integers(1, 3))
def test_no_budget_is_exceeded(unit: Unit, allocate: str, sites: list[SiteCurve], kept: float, round_to: int) -> None:
    found = allocated(sites, unit, kept, allocate, round_to)
    assume(found is not None)
    assert found is not None
    assert spent(sites, unit, found) <= kept * whole(sites, unit) * (1 + 1e-9) + 1e-6
    for site in sites:
        choice = found[site.name]
        assert choice.rank is None or (choice.rank % round_to == 0 and choice.form == site.form_at(choice.rank))


@units
@settings(max_examples=30, deadline=None)
@given(sites=with_costs(2), kept=shares)
def test_global_never_loses_more_than_uniform_in_any_unit(unit: Unit, sites: list[SiteCurve], kept: float) -> None:
    shared, equal = allocated(sites, unit, kept), allocated(sites, unit, kept, "uniform")
    assert (shared is None) == (equal is None)
    assume(shared is not None and equal is not None)
    assert shared is not None
    assert equal is not None
    assert loss(sites, shared) <= loss(sites, equal)


@units
@settings(max_examples=20, deadline=None)
@given(sites=with_costs(2), kept=shares, factor=st.sampled_from([1e-9, 3.0, 2.0**30]))
def test_scaling_all_losses_changes_no_choice_in_any_unit(
    unit: Unit, sites: list[SiteCurve], kept: float, factor: float
) -> None:
    scaled = [replace(site, losses=site.losses * factor) for site in sites]
    assert allocated(scaled, unit, kept) == allocated(sites, unit, kept)


@units
@settings(max_examples=20, deadline=None)
@given(sites=with_costs())
def test_an_impossible_amount_is_refused_with_one_that_works(unit: Unit, sites: list[SiteCurve]) -> None:
    key = {"numbers": "params_kept", "flops": "flops_kept", "bytes": "size_mb"}[unit]
    policy = {"numbers": ParamsKept, "flops": FlopsKept, "bytes": SizeMb}[unit]
    with pytest.raises(UsageError, match=rf"rank\.{key}: expected at least .* \(the smallest ranks everywhere\)") as caught:
        choose(sites, policy(**{key: 1e-9}), rest=REST)
    least = float(caught.value.expected.split()[2])
    assert set(choose(sites, policy(**{key: min(least, 1.0) if unit != "bytes" else least}), rest=REST)) == {
        site.name for site in sites
    }


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
@given(sites=several(2), kept=shares)
def test_equal_rows_make_flops_of_unbiased_sites_a_budget_of_numbers(sites: list[SiteCurve], kept: float) -> None:
    bare = [replace(site, bias=0, extra=0, rows=7.0) for site in sites]
    by_flops, by_numbers = allocated(bare, "flops", kept), allocated(bare, "numbers", kept)
    assume(by_flops is not None and by_numbers is not None)
    assert by_flops is not None
    assert by_numbers is not None
    assert {name: choice.rank for name, choice in by_flops.items()} == {n: choice.rank for n, choice in by_numbers.items()}
