"""The allocators beside one another: exact loses no more than global, global no more than uniform; all fit the budget."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from curves import curve, from_spectrum, several
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.errors import UsageError
from lrc.ranks import Candidates, Offer, ParamsKept, SiteCurve, allocate_ranks, exact, knapsack
from lrc.ranks.allocate import best_of, uniform_places
from lrc.ranks.candidates import Budget, total_cost, total_loss
from lrc.ranks.exact import exact_places
from lrc.ranks.log_inverse import log_inverse_places, shares, weights_of

ALLOCATORS = {
    "uniform": uniform_places,
    "global": best_of,
    "exact": lambda sites, budget: exact_places(sites, budget, best_of(sites, budget))[0],
    "loss_log_inverse": log_inverse_places,
}
each = pytest.mark.parametrize("name", list(ALLOCATORS))


LOSSES = st.just(0.0) | st.floats(1e-9, 30)


@st.composite
def menus(draw: st.DrawFn, most: int = 5) -> list[Candidates]:
    """Sites that offer candidates of two forms at any cost and loss, some alike."""
    made = []
    for i in range(draw(st.integers(1, most))):
        offers = []
        for form in ("a", "b"):
            count = draw(st.integers(0, 4))
            costs = torch.tensor(draw(st.lists(st.floats(0.1, 50), min_size=count, max_size=count)), dtype=torch.float64)
            losses = torch.tensor(draw(st.lists(LOSSES, min_size=count, max_size=count)), dtype=torch.float64)
            offers.append(Offer(form, torch.arange(1, count + 1), costs, losses))
        fixed, kind = draw(st.sampled_from([0.0, 3.0])), draw(st.sampled_from("xy"))
        made.append(Candidates.of(f"site{i}", offers, draw(st.floats(1, 40)), fixed=fixed, kind=kind))
    return made


@st.composite
def budgets(draw: st.DrawFn, sites: Sequence[Candidates]) -> Budget:
    """An amount between the least possible and all."""
    return budget_at(sites, draw(st.floats(0, 1)))


def budget_at(sites: Sequence[Candidates], part: float) -> Budget:
    least, fixed = total_cost(sites, [0] * len(sites)), sum(site.fixed for site in sites)
    all_of_it = total_cost(sites, [len(site.ranks) for site in sites])
    amount = least + part * (all_of_it - least)
    return Budget(amount, (amount + fixed) / (all_of_it + fixed))


@settings(max_examples=100, deadline=None)
@given(sites=menus())
def test_candidates_grow_in_cost_and_fall_in_loss(sites: list[Candidates]) -> None:
    for site in sites:
        assert len(site.ranks) == len(site.forms) == len(site.costs) - 1 == len(site.losses) - 1
        assert bool((site.costs.diff() > 0).all())
        assert bool((site.losses[:-1].diff() < 0).all())
        assert site.losses[-1] == 0


def test_a_candidate_that_another_form_beats_is_dropped() -> None:
    ranks, number = torch.tensor([1, 2]), torch.tensor
    first = Offer("channel", ranks, number([3.0, 6.0]).double(), number([5.0, 2.0]).double())
    second = Offer("spatial", ranks, number([4.0, 9.0]).double(), number([1.0, 0.5]).double())
    site = Candidates.of("conv", [first, second], 8.0)
    assert list(zip(site.ranks, site.forms, site.costs.tolist(), strict=False)) == [(1, "channel", 3.0), (1, "spatial", 4.0)]


@each
@settings(max_examples=60, deadline=None)
@given(sites=menus(), part=st.floats(0, 1))
def test_no_allocator_exceeds_any_budget(name: str, sites: list[Candidates], part: float) -> None:
    budget = budget_at(sites, part)
    assert total_cost(sites, ALLOCATORS[name](sites, budget)) <= budget.amount


@settings(max_examples=60, deadline=None)
@given(sites=menus(), part=st.floats(0, 1))
def test_exact_loses_no_more_than_global_and_global_no_more_than_uniform(sites: list[Candidates], part: float) -> None:
    budget = budget_at(sites, part)
    losses = {name: total_loss(sites, allocate(sites, budget)) for name, allocate in ALLOCATORS.items()}
    assert losses["exact"] <= losses["global"] <= losses["uniform"]


@settings(max_examples=60, deadline=None)
@given(sites=menus(most=3), part=st.floats(0, 1))
def test_exact_finds_what_trying_everything_finds(sites: list[Candidates], part: float) -> None:
    """To the gap that the solver is asked for, and its tolerance on the budget, of which a step may hang."""
    budget = budget_at(sites, part)
    found = total_loss(sites, ALLOCATORS["exact"](sites, budget))
    everything = list(product(*(range(len(site.costs)) for site in sites)))
    room = budget.amount - 2 * knapsack.TOLERANCE * max(float(site.costs.max()) for site in sites)
    fits = [total_loss(sites, places) for places in everything if total_cost(sites, places) <= room]
    scale = max(float(site.losses.max()) for site in sites)
    assert not fits or found <= min(fits) * (1 + knapsack.GAP) + 1e-6 * scale
    assert found >= min(total_loss(sites, p) for p in everything if total_cost(sites, p) <= budget.amount)


@pytest.mark.parametrize("name", ["uniform", "exact"])
@settings(max_examples=40, deadline=None)
@given(sites=menus(), parts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_budget_never_loses_more(name: str, sites: list[Candidates], parts: tuple[float, float]) -> None:
    small, large = (ALLOCATORS[name](sites, budget_at(sites, part)) for part in sorted(parts))
    scale = max(float(site.losses.max()) for site in sites)
    slack = 0 if name == "uniform" else 2e-6 * scale  # gap and tolerance of the solver
    assert total_loss(sites, large) <= total_loss(sites, small) + slack


@each
@settings(max_examples=30, deadline=None)
@given(sites=menus(), part=st.floats(0, 1), power=st.integers(-30, 30))
def test_scaling_all_losses_changes_nothing(name: str, sites: list[Candidates], part: float, power: int) -> None:
    budget = budget_at(sites, part)
    scaled = [replace(site, losses=site.losses * 4.0**power) for site in sites]  # its square root is exact too
    assert ALLOCATORS[name](scaled, budget) == ALLOCATORS[name](sites, budget)


# Exact.


def test_exact_beats_global_where_the_budget_cuts_a_large_step() -> None:
    sites = [
        from_spectrum(6, 6, torch.tensor([5.0, 4.9, 4.8, 0.1, 0.1, 0.1]), name=str(i), form="two_factor") for i in range(3)
    ]
    losses, notes = {}, ()
    for name in ("global", "exact"):
        found = allocate_ranks(sites, ParamsKept(params_kept=0.6), allocate=name)  # type: ignore[arg-type]
        losses[name] = sum(float(site.losses[found.choices[site.name].rank or 6]) for site in sites)
        notes = found.notes
    assert losses["exact"] <= losses["global"]
    assert len(notes) == 1
    assert notes[0].startswith("exact allocation: solved, within 0.00% of the least loss on its grid; predicted loss ")


def test_a_solver_that_is_stopped_leaves_the_global_choice_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SECONDS", 0.0)
    sites = [curve(60, 50, seed=i, name=str(i)).candidates("numbers") for i in range(6)]
    budget = budget_at(sites, 0.4)
    start = best_of(sites, budget)
    found, notes = exact_places(sites, budget, start)
    assert total_loss(sites, found) <= total_loss(sites, start)
    assert total_cost(sites, found) <= budget.amount
    assert "stopped after 0 s" in notes[0]


def test_a_grid_of_many_candidates_holds_the_ends_and_the_start() -> None:
    sites = [curve(300, 280, seed=i, name=str(i)).candidates("numbers") for i in range(3)]
    budget = budget_at(sites, 0.3)
    start = best_of(sites, budget)
    for site, place in zip(sites, start, strict=True):
        grid = exact._grid(site, place)
        assert {0, place, len(site.costs) - 1} <= set(grid)
        assert len(grid) <= exact.GRID + 1
    found, _ = exact_places(sites, budget, start)
    assert total_loss(sites, found) <= total_loss(sites, start)


# SVD-LLM v2.


def test_of_like_sites_the_one_that_loses_more_keeps_more() -> None:
    sites = [curve(40, 30, seed=1, scale=scale, name=f"layers.{i}.up") for i, scale in enumerate((1.0, 100.0))]
    found = allocate_ranks(sites, ParamsKept(params_kept=0.5), allocate="loss_log_inverse").choices
    low, high = found["layers.0.up"].rank, found["layers.1.up"].rank
    assert low is not None
    assert high is not None
    assert low < high
    equal = allocate_ranks(sites, ParamsKept(params_kept=0.5), allocate="uniform").choices
    assert equal["layers.0.up"].rank == equal["layers.1.up"].rank


def test_the_shares_of_a_group_are_those_of_the_formula() -> None:
    weights = weights_of(torch.tensor([2.0, 2.0 * torch.e, 2.0 * torch.e**3]))
    assert weights.tolist() == pytest.approx([1.0, 1 / 2, 1 / 4])
    assert shares(weights, 0.25).tolist() == pytest.approx([0.75 / 1.75, 0.375 / 1.75, 0.1875 / 1.75])
    clamped = shares(weights, 0.7)  # 3 · 0.7 · 1 / 1.75 > 1: what is over goes to the others
    assert clamped.tolist() == pytest.approx([1.0, 1.1 * 2 / 3, 1.1 / 3])
    assert shares(weights, 1.0).tolist() == [1.0, 1.0, 1.0]


def test_another_shape_or_name_is_another_group() -> None:
    """A site that is alone in its group gets the uniform share, however much it loses."""
    alone: list[SiteCurve] = [curve(40, 30, seed=1, scale=1e4, name="layers.0.up"), curve(30, 40, seed=1, name="layers.0.down")]
    choices = [
        allocate_ranks(alone, ParamsKept(params_kept=0.5), allocate=name).choices  # type: ignore[arg-type]
        for name in ("loss_log_inverse", "uniform")
    ]
    assert choices[0] == choices[1]


def test_sites_without_any_loss_are_no_division_by_zero() -> None:
    assert weights_of(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert weights_of(torch.tensor([0.0, 1.0])).tolist() == [1.0, 1.0]


@each
@settings(max_examples=20, deadline=None)
@given(sites=several(), kept=st.floats(0.05, 1.0), round_to=st.integers(1, 4))
def test_ranks_of_every_allocator_are_multiples(name: str, sites: list[SiteCurve], kept: float, round_to: int) -> None:
    try:
        found = allocate_ranks(sites, ParamsKept(params_kept=kept), allocate=name, round_to=round_to)  # type: ignore[arg-type]
    except UsageError:
        return
    assert all(choice.rank is None or choice.rank % round_to == 0 for choice in found.choices.values())
