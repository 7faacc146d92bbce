"""Allocators that share by what was measured on the model: block influence and the sensitivity of every layer alone."""

import math
from dataclasses import replace

import pytest
import torch
from curves import curve, several
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrc.ranks import Candidates, Evidence, Offer, ParamsKept, SiteCurve, allocate_ranks
from lrc.ranks.block_influence import BlockInfluence, shared_by_influence
from lrc.ranks.candidates import Budget, total_cost
from lrc.ranks.sensitivity_bisect import SensitivityBisect, rising, shared_by_sensitivity

values = st.floats(0, 1.5)
RATIOS = [0.1, 0.3, 0.5, 0.7, 0.9]


def fine(name: str, evidence: Evidence, cost: float = 1000.0) -> Candidates:
    """A site that may have any cost in steps of a thousandth."""
    ranks = torch.arange(1, 1000)
    offers = [Offer("a", ranks, cost * ranks.double() / 1000, 1000.0 - ranks.double())]
    return Candidates.of(name, offers, cost, evidence=evidence)


def removed(sites: list[Candidates], places: list[int]) -> list[float]:
    return [1 - float(site.costs[i] / site.costs[-1]) for site, i in zip(sites, places, strict=True)]


def budget_of(sites: list[Candidates], kept: float) -> Budget:
    return Budget(kept * sum(float(site.costs[-1]) for site in sites), kept)


# Block influence.


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_what_a_block_loses_is_the_softmax_of_its_influence(temperature: float) -> None:
    influences = [0.6, 0.2, 0.1, 0.3]
    sites = [fine(f"b{i}", Evidence(f"b{i}", s)) for i, s in enumerate(influences)]
    places, notes = shared_by_influence(sites, BlockInfluence(temperature=temperature), budget_of(sites, 0.9))
    softmax = torch.softmax(-torch.tensor(influences) / temperature, 0)
    assert removed(sites, places) == pytest.approx((4 * 0.1 * softmax).tolist(), abs=2e-3)
    assert notes == ("block influence: b0 0.6, b1 0.2, b2 0.1, b3 0.3",)


def test_equal_influences_share_equally_whatever_the_sizes() -> None:
    sites = [fine(f"b{i}", Evidence(f"b{i}", 0.4), cost) for i, cost in enumerate([100.0, 1000.0, 3000.0])]
    places, _ = shared_by_influence(sites, BlockInfluence(), budget_of(sites, 0.7))
    assert removed(sites, places) == pytest.approx([0.3] * 3, abs=2e-3)


def test_nothing_is_removed_twice_and_the_others_make_up_for_it() -> None:
    sites = [fine(f"b{i}", Evidence(f"b{i}", s)) for i, s in enumerate([0.0, 0.5, 0.6])]
    places, _ = shared_by_influence(sites, BlockInfluence(temperature=0.05), budget_of(sites, 0.5))
    lost = removed(sites, places)
    assert lost[0] == pytest.approx(1.0, abs=2e-3)
    assert sum(lost) == pytest.approx(1.5, abs=5e-3)
    assert lost[1] / lost[2] == pytest.approx(math.exp(2.0), rel=2e-2)


def test_a_site_outside_of_every_block_counts_as_one_of_mean_influence() -> None:
    sites = [fine("head", Evidence()), *(fine(f"b{i}", Evidence(f"b{i}", s)) for i, s in enumerate([0.2, 0.4]))]
    like = [fine("head", Evidence("c", 0.3)), *sites[1:]]
    found, wanted = (shared_by_influence(s, BlockInfluence(), budget_of(s, 0.8))[0] for s in (sites, like))
    assert found == wanted


# Sensitivity.


def test_all_layers_lose_the_same_where_the_ratios_allow_it() -> None:
    slopes = [1.0, 2.0, 5.0]
    sites = [fine(f"s{i}", Evidence(sensitivity=tuple((r, k * (1 - r)) for r in RATIOS))) for i, k in enumerate(slopes)]
    places, notes = shared_by_sensitivity(sites, SensitivityBisect(), budget_of(sites, 0.8))
    losses = [slope * lost for slope, lost in zip(slopes, removed(sites, places), strict=True)]
    assert losses == pytest.approx([losses[0]] * 3, abs=6e-3)
    assert sum(removed(sites, places)) == pytest.approx(0.6, abs=5e-3)
    assert notes == (f"sensitivity: every layer alone costs the model at most {losses[0]:.3g}",)


def test_the_one_that_costs_nothing_is_truncated_first() -> None:
    free, dear = (fine(n, Evidence(sensitivity=tuple((r, k * (1 - r)) for r in RATIOS))) for n, k in (("a", 0), ("b", 1)))
    places, _ = shared_by_sensitivity([free, dear], SensitivityBisect(), budget_of([free, dear], 0.7))
    assert removed([free, dear], places) == pytest.approx([0.6, 0.0], abs=2e-3)
    places, _ = shared_by_sensitivity([free, free], SensitivityBisect(), budget_of([free, free], 0.7))
    assert removed([free, free], places) == pytest.approx([0.3, 0.3], abs=2e-3)


def test_a_budget_below_the_smallest_ratio_is_shared_equally_and_says_so() -> None:
    sites = [fine(f"s{i}", Evidence(sensitivity=((0.5, k),))) for i, k in enumerate([1.0, 3.0])]
    places, notes = shared_by_sensitivity(sites, SensitivityBisect(ratios=[0.5]), budget_of(sites, 0.3))
    assert removed(sites, places) == pytest.approx([0.7, 0.7], abs=2e-3)
    assert "is below the smallest ratio, 0.5, everywhere; it is shared equally" in notes[0]


def test_a_sensitivity_that_falls_is_noise() -> None:
    shares, losses = rising([(0.9, 0.2), (0.5, 0.1), (0.7, -0.3), (0.1, 0.6)], 1.0)
    assert shares.tolist() == [1.0, 0.9, 0.7, 0.5, 0.1]
    assert losses == pytest.approx([0.0, 0.2, 0.2, 0.2, 0.6], abs=1e-5)
    assert all(losses[:-1] < losses[1:])


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0], [0.5, 1.2]])
def test_ratios_are_fractions(ratios: list[float]) -> None:
    with pytest.raises(ValidationError):
        SensitivityBisect(ratios=ratios)


# Both.


@st.composite
def measured(draw: st.DrawFn) -> list[SiteCurve]:
    """Sites of all shapes, of which much, little or nothing was measured."""
    made = []
    for site in draw(several()):
        block, influence = draw(st.sampled_from(["", "b0", "b1"])), draw(values | st.none())
        sensitivity = tuple((ratio, draw(st.floats(-0.5, 3))) for ratio in draw(st.sampled_from([[], [0.5], RATIOS])))
        made.append(replace(site, evidence=Evidence(block, influence, sensitivity)))
    return made


@given(sites=measured(), kept=st.floats(0.3, 1), name=st.sampled_from(["block_influence", "sensitivity_bisect"]))
@settings(max_examples=60, deadline=None)
def test_what_is_shared_fits_the_budget(sites: list[SiteCurve], kept: float, name: str) -> None:
    offered = [site.candidates("numbers") for site in sites]
    whole = total_cost(offered, [len(site.ranks) for site in offered]) + sum(site.fixed for site in offered)
    least = total_cost(offered, [0] * len(offered)) + sum(site.fixed for site in offered)
    kept = max(kept, least / whole * (1 + 1e-9))
    if kept > 1:
        return
    found = allocate_ranks(sites, ParamsKept(params_kept=kept), allocate=name).choices
    spent = sum(site.bias + (site.dense_size if (rank := found[site.name].rank) is None else site.size(rank)) for site in sites)
    assert spent <= kept * whole * (1 + 1e-9)


@pytest.mark.parametrize("name", ["block_influence", "sensitivity_bisect"])
def test_a_budget_of_everything_changes_nothing(name: str) -> None:
    sites = [replace(curve(9, 7, name=n), evidence=Evidence("b", 0.1, ((0.5, 1.0),))) for n in "ab"]
    found = allocate_ranks(sites, ParamsKept(params_kept=1.0), allocate=name).choices
    assert {choice.rank for choice in found.values()} == {None}
