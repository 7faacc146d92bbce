"""What the sites of a residual stream cost at a width, and the width that a budget allows."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from lrc.errors import UsageError
from lrc.maps import LinearMap, restore
from lrc.program import Program, Site
from lrc.program.residual import Stream
from lrc.ranks import FixedRank, FractionRank, ParamsKept, RankPolicy
from lrc.run import Summary
from lrc.run.summary import summarize

STREAM = "the residual stream"


class Cut(Protocol):
    """The options that sizes depend on."""

    @property
    def rank(self) -> RankPolicy:
        """Features to keep."""

    @property
    def round_to(self) -> int:
        """What they are a multiple of."""

    @property
    def bases(self) -> str:
        """`shared` or `block`."""

    @property
    def tied(self) -> str:
        """`keep` or `untie`."""


def keeps_table(site: Site, stream: Stream, options: Cut) -> bool:
    """Say whether a head keeps the table that it shares with an embedding of the stream."""
    return bool(site.tied) and bool(stream.embeddings) and options.tied == "keep"


class Sizes:
    """What the sites of a stream cost at a width, without making their maps."""

    def __init__(self, program: Program, stream: Stream, options: Cut) -> None:
        self.program, self.stream, self.options = program, stream, options
        self.touched = [fqn for fqn in program.sites if fqn in stream.readers or fqn in stream.writers]
        pairs = stream.shortcuts if options.bases == "block" else ()
        self.shortcuts: dict[str, int] = {}
        for cut in pairs:
            owner = next((fqn for fqn, basis in stream.writers.items() if basis == cut.after), self.touched[0])
            self.shortcuts[owner] = self.shortcuts.get(owner, 0) + 1

    def after(self, fqn: str, width: int) -> Summary:
        """Return the map of a site at a width in numbers, with the matrices of the residual connections that it writes into."""
        site = self.program.sites[fqn]
        maps = [self._map(site, width), *self._beside(site, width)]
        parts = [summarize(made) for made in maps]
        text = parts[0].text if len(parts) == 1 else f"{parts[0].text} + {', '.join(part.text for part in parts[1:])}"
        return Summary(text, sum(p.parameters for p in parts), sum(p.bytes for p in parts), sum(p.flops for p in parts))

    def _map(self, site: Site, width: int) -> LinearMap:
        reads, writes = site.fqn in self.stream.readers, site.fqn in self.stream.writers
        out_features, in_features = width if writes else site.out_features, width if reads else site.in_features
        bias = site.bias is not None or (reads and self.stream.norms[self.stream.norm_of[site.fqn]].bias is not None)
        full = self.stream.width
        structure: Mapping[str, Any] = {"map": "dense", "shape": [out_features, in_features], "bias": bias}
        if site.kind == "embedding":
            structure = {"map": "lookup", "shape": [in_features, out_features], "padding_index": None, "bias": bias}
        elif keeps_table(site, self.stream, self.options):
            structure = {"map": "chain", "names": ["B", "A"], "parts": [[out_features, full], [full, width]], "bias": bias}
        return outline(structure, site)

    def _beside(self, site: Site, width: int) -> list[LinearMap]:
        shapes = [[width, width]] * self.shortcuts.get(site.fqn, 0)
        if keeps_table(site, self.stream, self.options):
            shapes += [[width, self.stream.width]] * len(self.stream.embeddings)
        made = [outline({"map": "dense", "shape": shape, "bias": False}, site) for shape in shapes]
        if site.tied and self.stream.embeddings and self.options.tied == "untie":
            made += [
                outline({"map": "lookup", "shape": [site.out_features, width], "padding_index": None, "bias": False}, site)
            ]
        return made


def chosen_width(sizes: Sizes, counted: Sequence[str], options: Cut) -> int:
    """Return the features that the stream keeps. Raises UsageError for more than there are, and a budget that is too small."""
    full, rank, step = sizes.stream.width, options.rank, options.round_to
    if isinstance(rank, FixedRank):
        if rank.rank > full:
            raise UsageError(STREAM, expected=f"rank <= {full} (its features)", got=str(rank.rank), hint="Lower `rank`")
        return rank.rank
    if isinstance(rank, FractionRank):
        return full if rank.fraction == 1 else max(step, rank.most(full, full) // step * step)
    assert isinstance(rank, ParamsKept), "the options have checked it"
    before = {fqn: sizes.program.sites[fqn].map.cost(1).parameters for fqn in counted}
    amount = rank.params_kept * sum(before.values()) * (1 + 1e-12)
    if rank.params_kept == 1:
        return full
    still = sum(size for fqn, size in before.items() if fqn not in sizes.touched)
    extra = [fqn for fqn in sizes.shortcuts if fqn not in before]  # matrices between bases count, whoever is a target

    def cost(width: int) -> int:
        return (
            still + sum(sizes.after(fqn, width).parameters for fqn in counted if fqn in sizes.touched) + len(extra) * width**2
        )

    low, high = 0, (full - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle * step) <= amount else (low, middle - 1)
    if low == 0:
        least = cost(step) / max(sum(before.values()), 1)
        raise UsageError("rank.params_kept", expected=f"at least {least:.4g} (a stream of {step})", got=f"{rank.params_kept:g}")
    return low * step


def outline(structure: Mapping[str, Any], site: Site) -> LinearMap:
    """Return a map without numbers in the dtype of a site."""
    with torch.device("meta"):
        made: LinearMap = restore(structure)
        return made.to(site.dtype)
