"""What a ranked pass does with a solver in codes: a weight becomes a codebook over pieces in a few dimensions.

W     ->  Chain(Codebook, Segments)   codes and codewords, after one small basis for every piece of the inputs
W     ->  Chain(Z, Segments)          the same before it is clustered (`k: null`), for the recipe that does so in training
Conv  ->  the same: a convolution in groups that share one kernel, and 1 x 1 after it
"""

import math
from typing import Any

import torch

from lrc.maps import Chain, LinearMap, Patches, Rows, Segments, coded
from lrc.program import Site
from lrc.run.passes import Rewrite, Statistics
from lrc.run.plan import Keep
from lrc.run.solved_pass import SolvedPass, one_for_all
from lrc.solvers import Coded, CodedOptions
from lrc.spec.registry import SOLVERS


def in_codes(site: Site, statistics: Statistics, options: Any, generator: torch.Generator) -> Rewrite | Keep:
    """Return the map of a site in codes, or the reason why it stays."""
    solver: CodedOptions = options.solver
    reason = obstacle(site, solver.m)
    if reason is not None:
        return Keep(reason)
    weight, bias = site.map.dense()
    pieces = weight.numel() // solver.m
    rank = options.rank.most(pieces, solver.m)
    found: Coded = SOLVERS.for_options(solver)(weight, statistics.moments, rank, solver, generator)
    segments = segments_of(site, found.basis.to(site.dtype), weight.shape[1] // solver.m)
    d, error = (
        len(found.basis),
        math.sqrt((found.low_rank + found.clustering) / max(float(weight.double().square().sum()), 1e-300)),
    )
    if found.codebook is None or found.codes is None:
        Z = found.coefficients.to(site.dtype).reshape(len(weight), -1)
        outer: Any = site.layout.pointwise(Z) if segments.spatial else Z
        made: LinearMap = Chain(outer, segments, bias=bias)
        return Rewrite(made, (f"{d} of {solver.m} dimensions: error {error:.2%}; no codes yet", *found.notes), d)
    stored = torch.float16 if solver.dtype == "float16" else site.dtype
    made = coded(found.codes, found.codebook, segments, len(weight), stored, bias)
    after, before = made.cost().bytes, site.map.cost().bytes
    if after >= before:
        return Keep(
            f"{len(found.codebook)} codewords for {pieces} pieces need no fewer bytes: {after}, the dense weight {before}"
        )
    own = made.bias_cost(1).bytes
    bits, ratio = 8 * (after - own) / weight.numel(), (before - own) / (after - own)
    note = (
        f"{bits:.3f} bits a weight, {ratio:.1f}x smaller: error {error:.2%}, "
        f"{share(found.low_rank, found):.0%} of its square by {d} of {solver.m} dimensions, the rest by codes"
    )
    return Rewrite(made, (note, *found.notes), d)


def obstacle(site: Site, m: int) -> str | None:
    """Return why the weight of a site cannot be cut into pieces of m inputs, or None."""
    layout = site.layout
    if site.fqn in site.program.maps or not isinstance(layout, Rows | Patches):
        return f"only dense linears and convolutions are clustered, this is {site.map!r}"
    if layout.groups > 1:
        return f"a convolution in {layout.groups} groups is left alone"
    if site.in_features % m:
        return f"pieces of {m} numbers do not divide rows of {site.in_features}"
    taps = math.prod(layout.kernel) if isinstance(layout, Patches) else 1
    return f"pieces of {m} numbers are no whole channels of {taps} numbers each" if m % taps else None


def segments_of(site: Site, basis: torch.Tensor, count: int) -> Segments:
    """Return the map that takes every piece of a site's inputs to the coefficients of `basis`."""
    layout = site.layout
    if isinstance(layout, Patches):
        return Segments(basis, count, sizes=layout.kernel, geometry=layout.geometry)
    return Segments(basis, count)


def share(part: float, found: Coded) -> float:
    """Return a part of the squared error over all of it."""
    whole = found.low_rank + found.clustering
    return part / whole if whole else 0.0


coded_pass = SolvedPass(in_codes, one_for_all)
