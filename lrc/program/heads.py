"""Which feature of an attention is of which head, and which two a rotary embedding turns together: seen by labels.

Sites and attentions give labels in place of values, one for every feature, and what arrives says where it came from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lrc.program.absorb import aten
from lrc.program.program import Program
from lrc.program.sites import Site

SDPA = aten.scaled_dot_product_attention.default
CLOSE = 1e-3  # of the norm of two turned features in float32, or what bfloat16 and float16 leave of it


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

    def of(self, site: Site) -> Tensor:
        """Return the labels that a site gave, (out_features,)."""
        return self.sent[site.uses[0].node]

    def values_and_output(self, node: fx.Node, values: Tensor, o: Site) -> dict[str, int]:
        """Return the heads where values are read, and outputs written, head by head in order; nothing otherwise.

        values: the labels of values, head by head.
        """
        value, read = self.read[node.name][2], self.read[o.uses[0].node][0]
        heads, size = self.read[node.name][0].shape[1], value.shape[3]
        if heads * size != o.in_features or len(values) % size or heads % (len(values) // size):
            return {}
        labels = values.view(-1, size)
        wanted = labels.repeat_interleave(value.shape[1] // len(labels) or 1, 0)
        straight = wanted.shape == value.shape[1::2] and bool((value == wanted[None, :, None]).all())
        if not straight or not bool((read == self.sent[node.name]).all()):
            return {}
        return {"heads": heads, "kv_heads": len(labels), "size": size, "together": 1}

    def queries_and_keys(self, node: fx.Node, queries: Tensor, keys: Tensor) -> dict[str, int]:
        """Return the heads, and which features are turned together, where each goes to its own head; nothing otherwise.

        queries, keys: their labels, head by head.
        """
        query, key = self.read[node.name][:2]
        size = query.shape[3]
        if len(queries) != query.shape[1] * size or len(keys) % size:
            return {}
        sent = [labels.view(-1, size).float() for labels in (queries, keys)]
        if query.shape[1] % len(sent[1]) or key.shape[1] % len(sent[1]):
            return {}
        wanted = [labels.repeat_interleave(x.shape[1] // len(labels), 0) for labels, x in zip(sent, (query, key), strict=True)]
        arrived = [_unscaled(x.float(), labels) for x, labels in zip((query, key), wanted, strict=True)]
        for interleaved in (0, 1):
            turned = [_turned(x, labels, query.dtype, interleaved) for x, labels in zip(arrived, wanted, strict=True)]
            if turned[0] is not None and turned[0] == turned[1]:
                pairs = {"rotary": turned[0], "interleaved": interleaved, "together": 2 if turned[0] else 1}
                return {"heads": query.shape[1], "kv_heads": len(sent[1]), "size": size, **pairs}
        return {}


def _unscaled(arrived: Tensor, labels: Tensor) -> Tensor:
    """Return what arrived as the labels themselves, where it is the same multiple of all of them (queries that are scaled)."""
    sent = labels[None, :, None].expand_as(arrived)
    by = float((arrived * sent).sum() / sent.square().sum())
    return sent if torch.allclose(arrived, by * sent, rtol=CLOSE) and by else arrived


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
