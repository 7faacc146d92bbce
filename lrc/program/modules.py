"""Linears that make an MLP or an attention together, found by dataflow: what lies between them, and where features go.

MLP        every linear whose outputs meet through elementwise operations alone, and the one linear that reads the result
attention  the linears of queries, keys and values of a `scaled_dot_product_attention`, or the one linear that gives all three,
           and the one linear that reads its output
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lrc.program.absorb import SILENT, aten, find_region
from lrc.program.heads import SDPA, Probe
from lrc.program.program import Program
from lrc.program.sites import Site
from lrc.solvers.groups import fused_rows

MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.dropout.default,
    aten.flatten.using_ints, aten.repeat_interleave.self_int,
}  # fmt: skip
TURNS = MOVES | {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.cat.default, aten.stack.default}
SPLITS = TURNS | {
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.select.int, operator.getitem,
}  # fmt: skip


@dataclass(frozen=True)
class Linked:
    """Sites that make one module. kind: `mlp` (writers, then the reader), `vo`, `qk`, `qkvo` (a fused linear and the reader).

    facts: heads, what turns features, and where a fused linear has those of queries, keys and values.
    """

    kind: str
    sites: tuple[str, ...]
    facts: Mapping[str, int]


def linked_sites(program: Program, fqns: Sequence[str]) -> list[Linked]:
    """Return the MLPs and attentions among sites; a site is in one of them at most."""
    twin = program.clone()
    for fqn in fqns:
        if fqn not in twin.maps:
            twin.replace(fqn, twin.map_of(fqn), settle=False)
    twin.settle()
    sites = {fqn: site for fqn in fqns if len((site := twin.site(fqn)).uses) == 1 and not site.looped}
    at = {site.uses[0].node: site for site in sites.values()}
    found = [*_attentions(twin, at), *_mlps(twin, sites, at)]
    taken: set[str] = set()
    kept = []
    for linked in found:
        if taken.isdisjoint(linked.sites):
            taken |= set(linked.sites)
            kept.append(linked)
    return kept


def fused_linears(program: Program, fqns: Sequence[str]) -> set[str]:
    """Return the sites whose output is the queries, the keys and the values of an attention."""
    at = {site.uses[0].node: site for fqn in fqns if len((site := program.site(fqn)).uses) == 1}
    nodes = [node for node in program.graph_module.graph.nodes if node.target == SDPA]
    found = (_source(node, (0, 1, 2), at, SPLITS) for node in nodes)
    return {site.fqn for site in found if site is not None}


def _mlps(twin: Program, sites: Mapping[str, Site], at: dict[str, Site]) -> list[Linked]:
    found: dict[tuple[str, ...], Linked] = {}
    for site in sites.values():
        region = find_region(twin, site, at)
        if region is None or len(region.readers) != 1 or region.readers[0] in region.writers:
            continue
        members = (*sorted(region.writers, key=twin.position), *region.readers)
        width = sites[region.readers[0]].in_features
        if len(set(members)) == len(members) and all(sites[fqn].out_features == width for fqn in members[:-1]):
            found[members] = Linked("mlp", members, {})
    return list(found.values())


def _attentions(twin: Program, at: dict[str, Site]) -> list[Linked]:
    nodes = [node for node in twin.graph_module.graph.nodes if node.target == SDPA]
    if not nodes:
        return []
    roles: dict[fx.Node, tuple[Site | None, ...]] = {}
    for node in nodes:
        read = [_source(node, (place,), at, TURNS if place < 2 else MOVES) for place in range(3)]
        roles[node] = (*read, _source(node, (0, 1, 2), at, SPLITS), _reader(node, at))
    probe = Probe(twin, {site.uses[0].node for sites in roles.values() for site in sites[:4] if site is not None}, at)
    try:
        probe.run(*twin.inputs.fill(twin.inputs.examples).values())
    except (RuntimeError, IndexError, ValueError):  # labels are no values that the rest of the model must take
        return []
    found = []
    for node, (q, k, v, fused, o) in roles.items():
        if fused is not None and o is not None and (facts := fused_attention(probe, node, fused, o)):
            found.append(Linked("qkvo", (fused.fqn, o.fqn), facts))
        if v is not None and o is not None and (facts := probe.values_and_output(node, probe.of(v), o)):
            found.append(Linked("vo", (v.fqn, o.fqn), facts))
        if q is not None and k is not None and (facts := probe.queries_and_keys(node, probe.of(q), probe.of(k))):
            found.append(Linked("qk", (q.fqn, k.fqn), facts))
    return found


def fused_attention(probe: Probe, node: fx.Node, fused: Site, o: Site) -> dict[str, int]:
    """Return the facts of an attention whose queries, keys and values one linear gives; nothing where it is otherwise.

    Its rows are those of all queries, all keys and all values (GPT-2), or the queries that share a head of keys, that head,
    and its values, again and again (GPT-NeoX). `starts` of each, and `stride` from the queries that share a head to the next.
    """
    query = probe.read[node.name][0]
    heads, size = query.shape[1], query.shape[3]
    kv_heads, left = divmod(fused.out_features // size - heads, 2)
    if fused.out_features % size or left or kv_heads < 1 or heads % kv_heads:
        return {}
    shared = heads // kv_heads
    joined = {"start_k": heads * size, "start_v": (heads + kv_heads) * size, "stride_q": shared * size}
    joined |= {"stride_k": size, "stride_v": size}
    stride = (shared + 2) * size
    mixed = {"start_k": shared * size, "start_v": (shared + 1) * size}
    mixed |= {"stride_q": stride, "stride_k": stride, "stride_v": stride}
    for layout in (joined, mixed):
        base = {"heads": heads, "kv_heads": kv_heads, "size": size, "start_q": 0, **layout}
        labels = {role: probe.of(fused)[fused_rows(base, role)] for role in "qkv"}
        turned = probe.queries_and_keys(node, labels["q"], labels["k"])
        if turned and probe.values_and_output(node, labels["v"], o):
            return base | turned
    return {}


def _source(attention: fx.Node, places: Sequence[int], at: Mapping[str, Site], through: set[Any]) -> Site | None:
    """Return the site whose output becomes these arguments of an attention, and nothing else."""
    seen: set[fx.Node] = set()
    waiting: list[Any] = [attention.args[place] for place in places]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.name in at:
            found.add(node.name)
        elif node.op == "call_function" and node.target in through:
            waiting += node.all_input_nodes
    if len(found) != 1:
        return None
    (name,) = found
    start = next(node for node in seen if node.name == name)
    forward, reached = [start], {start}
    while forward:
        node = forward.pop()
        for user in node.users:
            if user is attention:
                if any(i not in places for i, arg in enumerate(user.args) if arg is node):
                    return None
            elif user.target not in SILENT and user not in reached:
                if user.op != "call_function" or user.target not in through or user not in seen:
                    return None
                reached.add(user)
                forward.append(user)
    return at[name]


def _reader(attention: fx.Node, at: Mapping[str, Site]) -> Site | None:
    """Return the one site that reads an attention's output, where nothing else does."""
    waiting, found = [attention], set()
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.name in at:
                found.add(user.name)
            elif user.op == "call_function" and user.target in MOVES:
                waiting.append(user)
            elif user.target not in SILENT:
                return None
    return at[found.pop()] if len(found) == 1 else None
