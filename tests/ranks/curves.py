"""Curves of made-up sites, what is spent on them, and the best that could be had."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lrc.ranks import Choice, Form, SiteCurve, Times


def curve(
    m: int, n: int, *, seed: int = 0, decay: float = 1.0, form: Form = "auto", scale: float = 1.0, bias: bool = False,
    extra: int = 0, name: str = "site",
) -> SiteCurve:  # fmt: skip
    """A site with a random spectrum that falls like rank ** -decay."""
    k = min(m, n)
    noise = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    S = (noise * torch.arange(1, k + 1).double() ** -decay).sort(descending=True)[0]
    return from_spectrum(m, n, S * scale**0.5, form=form, bias=m if bias else 0, extra=extra, name=name)


def from_spectrum(m: int, n: int, S: torch.Tensor, name: str = "site", **options: object) -> SiteCurve:
    squares = S.double().square()
    losses = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return SiteCurve(name, m, n, losses, S, **options)  # type: ignore[arg-type]


@st.composite
def several(draw: st.DrawFn, least: int = 1) -> list[SiteCurve]:
    """Sites of all shapes, some with a bias, some that no rank can shrink."""
    form = draw(st.sampled_from(["auto", "two_factor", "pivoted"]))
    made = []
    for i in range(draw(st.integers(least, 5))):
        m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        bias = draw(st.booleans())
        extra = 0 if bias or draw(st.booleans()) else m
        made.append(
            curve(
                m, n, seed=draw(st.integers(0, 10**6)), decay=draw(st.sampled_from([0.0, 0.5, 2.0])), form=form,
                scale=draw(st.sampled_from([0.01, 1.0, 30.0])), bias=bias, extra=extra, name=f"site{i}",
            )
        )  # fmt: skip
    return made


@st.composite
def with_costs(draw: st.DrawFn, least: int = 1) -> list[SiteCurve]:
    """Sites that differ in rows per sample, in the bytes of a number, in what an index takes, and in measured times."""
    itemsize = draw(st.sampled_from([2, 4]))
    return [
        replace(
            site,
            rows=draw(st.sampled_from([1.0, 2.5, 128.0])),
            itemsize=itemsize,
            index=4 * site.out_features / itemsize,
            times=draw(times_of(site)),
        )
        for site in draw(several(least))
    ]


@st.composite
def times_of(draw: st.DrawFn, site: SiteCurve) -> Times:
    """Measured times that grow with the rank but for noise, of some ranks."""
    ranks = sorted(draw(st.sets(st.integers(1, site.full_rank), min_size=1)))
    noise = st.floats(0.7, 1.3)
    forms = ("two_factor", "pivoted") if site.form == "auto" else (site.form,)
    return Times(
        draw(noise) * (1 + site.dense_size / 50),
        {form: {rank: draw(noise) * (1 + site.size(rank) / 50) for rank in ranks} for form in forms},
    )


def options_of(site: SiteCurve, round_to: int = 1) -> list[tuple[int | None, int, float]]:
    """Every choice for a site: (rank, size, loss); dense last."""
    ranks = [r for r in range(round_to, site.full_rank + 1, round_to) if site.size(r) < site.dense_size]
    return [*((r, site.size(r), float(site.losses[r])) for r in ranks), (None, site.dense_size, 0.0)]


def numbers(sites: Sequence[SiteCurve], choices: dict[str, Choice]) -> int:
    """The parameters that choices need, biases included."""
    ranks = {site.name: choices[site.name].rank for site in sites}
    return sum(s.bias + (s.dense_size if (r := ranks[s.name]) is None else s.size(r)) for s in sites)


def dense_numbers(sites: Sequence[SiteCurve]) -> int:
    return sum(site.dense_size + site.bias for site in sites)


def loss(sites: Sequence[SiteCurve], choices: dict[str, Choice]) -> float:
    """The predicted loss of choices."""
    ranks = {site.name: choices[site.name].rank for site in sites}
    return sum(0.0 if (r := ranks[s.name]) is None else float(s.losses[r]) for s in sites)


def least_loss(sites: Sequence[SiteCurve], kept: float) -> float | None:
    """The least predicted loss within the budget, by integer programming, or None where nothing fits."""
    options = [options_of(site) for site in sites]
    budget = int(kept * dense_numbers(sites) + 1e-6) - sum(site.bias for site in sites)
    losses = np.array([loss for of_site in options for _, _, loss in of_site])
    sizes = np.array([float(size) for of_site in options for _, size, _ in of_site])
    one_each = np.zeros((len(sites), len(losses)))
    start = 0
    for i, of_site in enumerate(options):
        one_each[i, start : start + len(of_site)] = 1
        start += len(of_site)
    scale = losses.max() or 1.0
    found = milp(
        losses / scale,
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(sizes, -np.inf, budget), LinearConstraint(one_each, 1, 1)],
        options={"mip_rel_gap": 1e-9},
    )
    return None if found.x is None else float(found.fun) * scale


def order(site: SiteCurve, choice: Choice) -> int:
    """The rank as a number; dense is above every rank."""
    return site.full_rank + 1 if choice.rank is None else choice.rank
