"""Policies for one site: the rank that was asked for, or dense with a reason where that would not shrink the layer."""

import pytest
import torch
from curves import curve, from_spectrum, several
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.ranks import BreakevenRank, Choice, EnergyRank, FixedRank, FractionRank, SiteCurve, choose, product_size
from lrc.ranks.policies import breakeven_rank, energy_rank, fraction_rank

SHAPES = [(1, 7), (7, 1), (8, 3), (3, 8), (6, 6)]
fractions = st.floats(0.001, 1.0)


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), energy=fractions)
def test_energy_rank_is_the_smallest_that_keeps_the_energy(shape: tuple[int, int], seed: int, energy: float) -> None:
    site = curve(*shape, seed=seed)
    rank = energy_rank(site, EnergyRank(energy=energy))
    kept = site.S.square().cumsum(0) / site.S.square().sum()
    rounding = 16 * len(kept) * torch.finfo(torch.float64).eps
    assert kept[rank - 1] >= energy - rounding
    assert rank == 1 or kept[rank - 2] < energy


def test_energy_rank_of_a_known_spectrum() -> None:
    site = from_spectrum(4, 5, torch.tensor([3.0, 2.0, 1.0, 1.0]))
    assert [energy_rank(site, EnergyRank(energy=e)) for e in (0.1, 0.6, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]


def test_all_energy_needs_no_more_than_the_rank_of_the_weight() -> None:
    deficient = from_spectrum(6, 6, torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]))
    assert energy_rank(deficient, EnergyRank(energy=1.0)) == 3
    assert energy_rank(from_spectrum(6, 6, torch.zeros(6)), EnergyRank(energy=0.5)) == 1


def test_the_unit_of_the_loss_changes_no_energy_rank() -> None:
    for scale in (1e-20, 1.0, 1e20):
        assert energy_rank(curve(9, 8, seed=3, scale=scale), EnergyRank(energy=0.8)) == energy_rank(
            curve(9, 8, seed=3), EnergyRank(energy=0.8)
        )


@pytest.mark.parametrize("shape", [*SHAPES, (100, 200), (150, 75)])
def test_fraction_and_breakeven_ranks_round_down_and_keep_at_least_one(shape: tuple[int, int]) -> None:
    m, n = shape
    site = curve(m, n)
    for percent in range(1, 101):
        assert fraction_rank(site, FractionRank(fraction=percent / 100)) == max(1, percent * min(m, n) // 100)
        assert breakeven_rank(site, BreakevenRank(breakeven=percent / 100)) == max(1, percent * m * n // (100 * (m + n)))


@pytest.mark.parametrize(("m", "n", "rank"), [(768, 768, 96), (3072, 768, 153), (768, 3072, 153)])
def test_a_quarter_of_the_break_even_rank_is_that_of_greenformers(m: int, n: int, rank: int) -> None:
    """Its limits are 384 and 614; a rank of 400, or of the limit itself where that saves nothing, leaves the layer alone."""
    assert breakeven_rank(curve(m, n), BreakevenRank(breakeven=0.25)) == rank
    limit = m * n // (m + n)
    dense = m * n
    assert product_size(m, n, limit, "two_factor") <= dense < product_size(m, n, limit + 1, "two_factor")
    assert (product_size(m, n, limit, "two_factor") == dense) == (m == n)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_sizes_follow_their_formulas(m: int, n: int) -> None:
    for rank in range(1, min(m, n) + 1):
        assert product_size(m, n, rank, "two_factor") == rank * (m + n)
        assert product_size(m, n, rank, "pivoted") == product_size(m, n, rank, "auto") == rank * (m + n - rank)
    for form in ("auto", "two_factor", "pivoted"):
        site = curve(m, n, form=form, extra=m)
        ranks = torch.arange(1, site.full_rank + 1)
        assert site.cost("numbers", site.form_at(1), ranks).tolist() == [site.size(r) for r in ranks.tolist()]
        assert site.size(1) == product_size(m, n, 1, form) + m


def test_a_number_is_the_rank_of_every_site() -> None:
    sites = [curve(8, 6, name="a"), curve(5, 9, name="b")]
    assert choose(sites, FixedRank(rank=2)) == {"a": Choice(2, form="pivoted"), "b": Choice(2, form="pivoted")}


@pytest.mark.parametrize(
    ("site", "rank", "reason"),
    [
        (curve(6, 6, form="two_factor"), 3, "rank 3 needs 36 numbers, the dense weight 36"),
        (curve(6, 6, form="two_factor"), 5, "rank 5 needs 60 numbers, the dense weight 36"),
        (curve(6, 6), 6, "rank 6 needs 36 numbers, the dense weight 36"),
        (curve(6, 6, extra=6), 4, "rank 4 needs 38 numbers, the dense weight 36"),
        (curve(1, 7), 1, "rank 1 needs 7 numbers, the dense weight 7"),
        (curve(7, 1), 1, "rank 1 needs 7 numbers, the dense weight 7"),
    ],
)
def test_a_layer_that_would_not_shrink_stays_dense_with_the_reason(site: SiteCurve, rank: int, reason: str) -> None:
    assert choose([site], FixedRank(rank=rank)) == {"site": Choice(None, reason)}


def test_a_layer_that_shrinks_by_one_number_is_taken() -> None:
    assert choose([curve(6, 6)], FixedRank(rank=5)) == {"site": Choice(5, form="pivoted")}
    assert choose([curve(7, 6, form="two_factor")], FixedRank(rank=3)) == {"site": Choice(3, form="two_factor")}


@settings(max_examples=30, deadline=None)
@given(sites=several(), round_to=st.integers(1, 5), share=fractions, kind=st.sampled_from(["energy", "fraction", "breakeven"]))
def test_ranks_are_multiples_of_round_to_and_always_shrink(
    sites: list[SiteCurve], round_to: int, share: float, kind: str
) -> None:
    options = {"energy": EnergyRank, "fraction": FractionRank, "breakeven": BreakevenRank}[kind](**{kind: share})
    for site in sites:
        found = choose([site], options, round_to=round_to)[site.name]
        if found.rank is None:
            assert "numbers, the dense weight" in found.reason
        else:
            assert found.rank % round_to == 0
            assert 1 <= found.rank <= site.full_rank
            assert site.size(found.rank) < site.dense_size


def test_round_to_rounds_down_and_never_to_zero() -> None:
    site = curve(40, 40)
    ranks = [choose([site], FixedRank(rank=r), round_to=8)["site"].rank for r in (3, 8, 15, 16, 31)]
    assert ranks == [8, 8, 8, 16, 24]
