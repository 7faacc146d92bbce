"""Options of sites under one budget: exact, and never better than trying everything."""

from itertools import product

import pytest
import torch

from lrc.ranks import BytesKept, OptionsCurve, SizeMb, allocate_ranks

SITES, OPTIONS, NOW = 4, 6, 1000.0


def curves(seed: int) -> list[OptionsCurve]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(SITES):
        costs = (1100 * torch.rand(OPTIONS, generator=generator, dtype=torch.float64)).round()
        losses = torch.rand(OPTIONS, generator=generator, dtype=torch.float64) * 10.0**-i
        names = tuple(f"option {k}" for k in range(OPTIONS))
        made.append(OptionsCurve(f"site {i}", names, losses, {"bytes": costs}, {"bytes": NOW}))
    return made


def best(sites: list[OptionsCurve], amount: float) -> float:
    ways = [[(NOW, 0.0), *zip(s.costs["bytes"].tolist(), s.losses.tolist(), strict=True)] for s in sites]
    return min(sum(loss for _, loss in way) for way in product(*ways) if sum(cost for cost, _ in way) <= amount)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", [0.35, 0.6, 1.0])
def test_no_combination_that_fits_loses_less(seed: int, kept: float) -> None:
    sites = curves(seed)
    found = allocate_ranks(sites, BytesKept(bytes_kept=kept), allocate="exact", key="budget")
    cost = loss = 0.0
    for site in sites:
        place = found.choices[site.name].rank
        cost += NOW if place is None else float(site.costs["bytes"][place])
        loss += 0.0 if place is None else float(site.losses[place])
    assert cost <= kept * SITES * NOW
    assert loss == pytest.approx(best(sites, kept * SITES * NOW), rel=1e-6)
    assert kept == 1.0 or "within 0.00%" in found.notes[0]


def test_a_size_is_that_of_the_model_with_what_stays() -> None:
    sites = curves(0)
    found = allocate_ranks(sites, SizeMb(size_mb=0.0042), allocate="exact", rest=2200)
    same = allocate_ranks(sites, BytesKept(bytes_kept=0.5), allocate="exact")
    assert found.choices == same.choices


def test_neighbours_are_those_on_the_front() -> None:
    site = OptionsCurve(
        "a", ("x", "y", "z", "w"), torch.tensor([3.0, 1.0, 2.0, 2.5]).double(),
        {"bytes": torch.tensor([100.0, 400.0, 200.0, 300.0]).double()}, {"bytes": 500.0},
    )  # fmt: skip
    assert site.neighbours("bytes", 2) == (0, 1)
    assert site.neighbours("bytes", 0) == (None, 2)
    assert site.neighbours("bytes", None) == (1, None)
