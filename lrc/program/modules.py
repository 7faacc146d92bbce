"""Linears that make an MLP or an attention together, found by dataflow: what lies between them, and where features go.

MLP        every linear whose outputs meet through elementwise operations alone, and the one linear that reads the result
attention  the linears of queries, keys and values of a `scaled_dot_product_attention`, and the one linear that reads its output

Which feature is of which head, and which two a rotary embedding turns together, is seen by sending labels through the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrc.program.absorb import SILENT, aten, find_region
from lrc.program.program import Program
from lrc.program.sites import Site

SDPA = aten.scaled_dot_product_attention.default
MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.dropout.default,
    aten.flatten.using_ints, aten.repeat_interleave.self_int,
}  # fmt: skip
TURNS = MOVES | {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.cat.default, aten.stack.default}
CLOSE = 1e-3  # of the norm of two turned features in float32, or what bfloat16 and float16 leave of it


@dataclass(frozen=True)
class Linked:
    """Sites that make one module. kind: `mlp` (writers, then the reader), `vo`, `qk`; facts: heads and what turns features."""

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
    roles: dict[fx.Node, tuple[Site | None, ...]] = {}
    for node in nodes:
        read = [_source(node, place, at, TURNS if place < 2 else MOVES) for place in range(3)]
        roles[node] = (*read, _reader(node, at))
    if not nodes:
        return []
    probe = Probe(twin, {site.uses[0].node for sites in roles.values() for site in sites[:3] if site is not None}, at)
    try:
        probe.run(*twin.inputs.fill(twin.inputs.examples).values())
    except (RuntimeError, IndexError, ValueError):  # labels are no values that the rest of the model must take
        return []
    found = []
    for node, (q, k, v, o) in roles.items():
        if v is not None and o is not None and (facts := probe.values_and_output(node, v, o)):
            found.append(Linked("vo", (v.fqn, o.fqn), facts))
        if q is not None and k is not None and (facts := probe.queries_and_keys(node, q, k)):
            found.append(Linked("qk", (q.fqn, k.fqn), facts))
    return found


def _source(attention: fx.Node, place: int, at: Mapping[str, Site], through: set[Any]) -> Site | None:
    """Return the site whose output becomes an argument of an attention, and nothing else."""
    seen: set[fx.Node] = set()
    waiting: list[Any] = [attention.args[place]]
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
                if [i for i, arg in enumerate(user.args) if arg is node] != [place]:
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


class Probe(fx.Interpreter):
    """A run in which sites and attentions give labels, one for every feature, so that what arrives says where it came from."""

    def __init__(self, twin: Program, sources: set[str], at: Mapping[str, Site]) -> None:
        super().__init__(twin.graph_module)
        self.sources, self.at = sources, at
        self.generator = torch.Generator().manual_seed(0)
        self.sent: dict[str, Tensor] = {}
        self.read: dict[str, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what it gives is labels where that is looked at."""
        if n.target == SDPA or n.name in self.at:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            self.read[n.name] = tuple(value for value in arguments if isinstance(value, Tensor))
        value = super().run_node(n)
        if n.target != SDPA and n.name not in self.sources:
            return value
        shape = (value.shape[1], 1, value.shape[3]) if n.target == SDPA else (value.shape[-1],)
        labels = torch.randn(shape, generator=self.generator).to(value)
        self.sent[n.name] = labels.flatten()
        return labels.expand_as(value).contiguous()

    def values_and_output(self, node: fx.Node, v: Site, o: Site) -> dict[str, int]:
        """Return the heads where values are read, and outputs written, head by head in order; nothing otherwise."""
        value, read = self.read[node.name][2], self.read[o.uses[0].node][0]
        heads, size = self.read[node.name][0].shape[1], value.shape[3]
        if heads * size != o.in_features or v.out_features % size or heads % (v.out_features // size):
            return {}
        labels = self.sent[v.uses[0].node].view(-1, size)
        wanted = labels.repeat_interleave(value.shape[1] // len(labels) or 1, 0)
        straight = wanted.shape == value.shape[1::2] and bool((value == wanted[None, :, None]).all())
        if not straight or not bool((read == self.sent[node.name]).all()):
            return {}
        return {"heads": heads, "kv_heads": len(labels), "size": size, "together": 1}

    def queries_and_keys(self, node: fx.Node, q: Site, k: Site) -> dict[str, int]:
        """Return the heads, and which features are turned together, where each goes to its own head; nothing otherwise."""
        query, key = self.read[node.name][:2]
        size = query.shape[3]
        if q.out_features != query.shape[1] * size or k.out_features % size:
            return {}
        sent = [self.sent[site.uses[0].node].view(-1, size).float() for site in (q, k)]
        if query.shape[1] % len(sent[1]) or key.shape[1] % len(sent[1]):
            return {}
        wanted = [labels.repeat_interleave(x.shape[1] // len(labels), 0) for labels, x in zip(sent, (query, key), strict=True)]
        arrived = [query.float(), key.float()]
        for interleaved in (0, 1):
            turned = [_turned(x, labels, query.dtype, interleaved) for x, labels in zip(arrived, wanted, strict=True)]
            if turned[0] is not None and turned[0] == turned[1]:
                pairs = {"rotary": turned[0], "interleaved": interleaved, "together": 2 if turned[0] else 1}
                return {"heads": query.shape[1], "kv_heads": len(sent[1]), "size": size, **pairs}
        return {}


def _turned(arrived: Tensor, labels: Tensor, dtype: torch.dtype, interleaved: int) -> int | None:
    """Return how many first features of a head are turned in pairs, the rest arriving as sent; None where it is otherwise.

    arrived: (batch, heads, tokens, size). labels: (heads, size).
    """
    if arrived.shape[2] < 2:  # the first token is not turned
        return None
    sent = labels[None, :, None].expand_as(arrived)
    moved = (arrived != sent).any(0).any(0).any(0)
    rotary = int(moved.nonzero().max()) + 1 if bool(moved.any()) else 0
    if rotary % 2 or ((labels.shape[1] - rotary) % 2 and rotary):
        return None
    norms = [pairs_of(x[..., :rotary], interleaved).square().sum(-1) for x in (arrived, sent)]
    close = CLOSE if dtype == torch.float32 or dtype == torch.float64 else 0.05
    return rotary if torch.allclose(norms[0], norms[1], rtol=close) else None


def pairs_of(x: Tensor, interleaved: int) -> Tensor:
    """Return features (..., 2 n) as pairs that are turned together, (..., n, 2)."""
    half = x.shape[-1] // 2
    return x.reshape(*x.shape[:-1], half, 2) if interleaved else x.reshape(*x.shape[:-1], 2, half).transpose(-1, -2)
