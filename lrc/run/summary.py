"""Maps in numbers, for decisions: of a map that exists, and of a low-rank product that is only planned."""

from functools import lru_cache
from typing import Any

import torch

from lrc.forms import kernel_form
from lrc.maps import Layout, LinearMap, Patches, pivoted_structure, planned, restore
from lrc.program import Site
from lrc.run.plan import Summary


def summarize(made: LinearMap) -> Summary:
    """Return the text and cost of a map; FLOPs are for one token."""
    cost = made.cost(1)
    return Summary(repr(made), cost.parameters, cost.bytes, cost.flops)


def standing(site: Site) -> Summary:
    """Return the text and cost of what stands at a site; sites of one shape that no pass has touched are alike."""
    if site.fqn in site.program.maps:
        return summarize(site.map)
    layout: Any = site.layout  # layouts are frozen, which their protocol does not say
    return untouched(layout, site.shape, site.dtype, site.uses[0].bias is not None)


def stays(site: Site) -> bool:
    """Say whether the site's weight goes on being read by something else when a map takes its place."""
    return site.fqn not in site.program.maps and bool(site.tied)


@lru_cache(maxsize=256)
def untouched(layout: Layout, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> Summary:
    """Return the text and cost of what a model stores in this layout."""
    with torch.device("meta"):
        weight = torch.empty(shape, dtype=dtype)
        made = layout.dense(weight, torch.empty(shape[0], dtype=dtype) if bias else None)
    return summarize(made.requires_grad_(False))


def sketch(site: Site, rank: int, form: str, *, bias: bool, ranks: tuple[int, ...] = ()) -> Summary:
    """Return what a rank-`rank` product in `form` would cost at `site`, without making one."""
    return summarize(outline(site, rank, form, bias=bias, ranks=ranks).to(site.dtype))


def outline(site: Site, rank: int, form: str, *, bias: bool, ranks: tuple[int, ...] = ()) -> LinearMap:
    """Return a rank-`rank` product in `form` at `site` without numbers. ranks: all of them, where the form has several."""
    kernels, layout = kernel_form(form), site.layout
    with torch.device("meta"):
        if kernels is not None and isinstance(layout, Patches):
            return kernels.outline(layout, layout.size(site.shape), ranks or (rank,), bias=bias)
        if form == "pivoted":
            return restore(pivoted_structure(site.out_features, rank, site.in_features, bias=bias))
        return planned(site.layout, site.shape, rank, bias=bias)
