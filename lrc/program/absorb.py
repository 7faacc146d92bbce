"""Absorbing the order of pivoted outputs: free wherever only elementwise operations stand between a map and its readers.

    %u = up(%x)[perm];  %h = gelu(%u);  %y = down(%h)    ->    %u = up'(%x);  %h = gelu(%u);  %y = down'(%h)

Every map that writes into the region gives its outputs in the new order, every map that reads from it takes them so. Of
two pivoted maps that meet (a gated MLP), one loses its index and the other one changes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lrc.maps import (
    Chain,
    LinearMap,
    Pick,
    Pivoted,
    Spread,
    permute_inputs,
    permute_outputs,
    pick_of,
    spread_of,
    without_pick,
    without_spread,
)
from lrc.program.program import Program
from lrc.program.sites import Site

aten = torch.ops.aten
ELEMENTWISE = {
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default,
    aten.leaky_relu.default, aten.hardswish.default, aten.hardtanh.default, aten.softplus.default, aten.exp.default,
    aten.neg.default, aten.abs.default, aten.square.default, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.add.Tensor,
    aten.sub.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.add.Scalar, aten.dropout.default, aten.clone.default,
    aten.contiguous.default, aten.detach.default, aten.alias.default, aten.to.dtype, aten.to.dtype_layout,
    aten._to_copy.default, aten.relu_.default, aten.silu_.default,
}  # fmt: skip
SILENT = {aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class Region:
    """The elementwise nodes between the sites that write into it and the sites that read from it; `nodes` holds their names."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    nodes: tuple[str, ...] = ()


def absorb_permutations(program: Program) -> dict[str, str]:
    """Remove every index of a pivoted output that its readers can absorb. Returns what was done, by site."""
    single = {site.uses[0].node: site for site in program.sites.values() if len(site.uses) == 1 and not site.looped}
    notes: dict[str, str] = {}
    for fqn in list(program.maps):
        made = program.maps[fqn]
        if not isinstance(made, Pivoted) or made.side != "out" or made.index is None:
            continue
        region = find_region(program, program.sites[fqn], single)
        if region is None:
            continue
        changed = _in_order(program, region, made.index.long().argsort())
        if changed is None or sum(map(_indexed, changed.values())) >= sum(_indexed(program.maps[name]) for name in changed):
            continue
        for name, new in changed.items():
            program.replace(name, new, program.made_by.get(name, ""), settle=False)
        notes[fqn] = f"output order absorbed by {', '.join(region.readers)}"
    program.settle()
    return notes


def absorb_places(program: Program) -> dict[str, str]:
    """Narrow every region that is written at some places alone, which are all that is read of it. Returns notes, by site.

    Chain(Spread, X) … Chain(Y, Pick) with the same places become X … Y, and what stands between them gets narrower.
    """
    single = {site.uses[0].node: site for site in program.sites.values() if len(site.uses) == 1 and not site.looped}
    notes: dict[str, str] = {}
    for fqn in list(program.maps):
        written = spread_of(program.maps[fqn])
        region = find_region(program, program.sites[fqn], single) if written is not None else None
        if written is None or region is None:
            continue
        ends: list[Pick | Spread | None] = [spread_of(program.maps[name]) for name in region.writers]
        ends += [pick_of(program.maps[name]) for name in region.readers]
        if any(end is None or not torch.equal(end.places(), written.places()) for end in ends):
            continue
        for strip, names in ((without_spread, region.writers), (without_pick, region.readers)):
            for name in names:
                made = program.maps[name]
                assert isinstance(made, Chain), "a place stands in a chain"
                program.replace(name, strip(made), program.made_by.get(name, ""), settle=False, resize=True)
        program.narrow(region.nodes, written.kept)
        notes[fqn] = f"{written.kept} of {written.size} features, here and in {', '.join(region.readers)}"
    return notes


def find_region(program: Program, site: Site, single: dict[str, Site]) -> Region | None:
    """Return the region that a site writes into, or None where something in it depends on the order."""
    if len(site.uses) != 1 or site.looped:
        return None
    nodes = program.nodes
    waiting, carriers = [nodes[site.uses[0].node]], {site.uses[0].node}
    writers, readers = [site.fqn], []
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.name in carriers or user.target in SILENT:
                continue
            reader = _site_at(program, user, single)
            if reader is not None and reader.uses[0].input == node.name:
                readers.append(reader.fqn)
            elif user.op == "call_function" and user.target in ELEMENTWISE:
                carriers.add(user.name)
                waiting.append(user)
            else:
                return None
        for read in _tensor_reads(node) if node.op == "call_function" else ():
            if read.name in carriers or not _varies(read):
                continue
            writer = _site_at(program, read, single)
            if writer is not None:
                writers.append(writer.fqn)
            elif read.op != "call_function" or read.target not in ELEMENTWISE:
                return None
            carriers.add(read.name)
            waiting.append(read)
    return Region(tuple(writers), tuple(dict.fromkeys(readers)), tuple(carriers)) if readers else None


def _site_at(program: Program, node: fx.Node, single: dict[str, Site]) -> Site | None:
    """Return the site that a node calls, where a pass has put a map there and this is its only use."""
    site = single.get(node.name)
    return site if site is not None and site.fqn in program.maps else None


def _tensor_reads(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _indexed(made: LinearMap) -> int:
    """Return how many entries of indices a map holds."""
    return sum(part.index.numel() for part in made.modules() if isinstance(part, Pivoted) and part.index is not None)


def _varies(node: fx.Node) -> bool:
    """Say whether a value has entries along the last dimension that are told apart by their place."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or (value.ndim > 0 and value.shape[-1] != 1)


def _in_order(program: Program, region: Region, order: Tensor) -> dict[str, LinearMap] | None:
    """Return the region's maps in the new order, or None where one of them cannot take it."""
    changed: dict[str, LinearMap] = {}
    for permute, names in ((permute_outputs, region.writers), (permute_inputs, region.readers)):
        for name in names:
            new = permute(changed.get(name, program.maps[name]), order)
            if new is None:
                return None
            changed[name] = new
    return changed
