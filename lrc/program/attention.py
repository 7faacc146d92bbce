"""`nn.MultiheadAttention` whose projections are maps: its weights have no modules of their own that a map could replace."""

import math
import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.maps import LinearMap

PACKED = re.compile(r"in_proj_weight(?:_(\d+)_(\d+))?")  # all rows, or those from one to before another
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class MappedAttention(nn.MultiheadAttention):
    """The attention of a module that it takes the place of, with the same arguments, parameters and results.

    Projections stand under the names of the weights that they took the place of; a weight of which a part is a map is kept
    in parts too. torch's own encoder layers see that there is no fused form of it.
    """

    rows: tuple[tuple[int, int, str], ...]

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> "MappedAttention":
        """Return the attention with everything that `module` holds, which is not to be used any more."""
        made = cls.__new__(cls)
        made.__dict__ = module.__dict__
        size = made.embed_dim
        separate = tuple((i * size, (i + 1) * size, name) for i, name in enumerate(SEPARATE))
        made.rows = ((0, 3 * size, "in_proj_weight"),) if made._qkv_same_embed_dim else separate
        made._qkv_same_embed_dim = False
        return made

    def put(self, name: str, made: LinearMap) -> None:
        """Put a map in place of a weight and its bias. Raises AttributeError for a name that is no projection."""
        if name == "out_proj":
            self.add_module("out_proj", made)
            return
        found = PACKED.fullmatch(name)
        first, last = (int(place or 0) for place in found.groups()) if found else (0, 0)
        if found and first < last:
            self._cut(first, last)
        elif name not in [row[2] for row in self.rows]:
            raise AttributeError(name)
        self._parameters.pop(name, None)
        self.add_module(name, made)
        if all(isinstance(getattr(self, row[2]), nn.Module) for row in self.rows):
            self.register_parameter("in_proj_bias", None)

    def _cut(self, first: int, last: int) -> None:
        """Keep the rows from one to before another apart from the others."""
        rows: list[tuple[int, int, str]] = []
        for start, stop, name in self.rows:
            if not start <= first < last <= stop or (start, stop) == (first, last):
                rows.append((start, stop, name))
                continue
            held = self._parameters.pop(name)
            assert held is not None, "only what is still a weight can be cut"
            edges = sorted({start, first, last, stop})
            for low, high in pairwise(edges):
                part = f"in_proj_weight_{low}_{high}"
                self.register_parameter(part, nn.Parameter(held.detach()[low - start : high - start], held.requires_grad))
                rows.append((low, high, part))
        self.rows = tuple(rows)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `nn.MultiheadAttention.forward`. is_causal is a hint of torch's that `attn_mask` is causal."""
        q, k, v = (self._heads(part) for part in self._projected(query, key, value))  # (batch, heads, length, features)
        if self.bias_k is not None:
            k, v = (self._beside(part, row) for part, row in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(part, (0, 0, 0, 1)) for part in (k, v))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-1, -2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropped)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropped)
        y = self._out(attended.transpose(1, 2).flatten(2))
        if query.ndim == 2:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values; a projection of several of them runs once where they project the same value."""
        done: dict[tuple[int, str], Tensor] = {}
        made = []
        for i, x in enumerate((query, key, value)):
            first, last = i * self.embed_dim, (i + 1) * self.embed_dim
            start, stop, name = next(row for row in self.rows if row[0] <= first and last <= row[1])
            if (id(x), name) not in done:
                done[id(x), name] = self._apply_rows(x, start, stop, name)
            made.append(done[id(x), name][..., first - start : last - start])
        return made

    def _apply_rows(self, x: Tensor, start: int, stop: int, name: str) -> Tensor:
        held: Any = getattr(self, name)
        if isinstance(held, nn.Module):
            made: Tensor = held(x)
            return made
        return F.linear(x, held, None if self.in_proj_bias is None else self.in_proj_bias[start:stop])

    def _out(self, x: Tensor) -> Tensor:
        made: Tensor = self.out_proj(x)
        return made

    def _heads(self, x: Tensor) -> Tensor:
        """Return (batch, heads, length, features) of what has the shape of an input."""
        x = x.unsqueeze(0) if x.ndim == 2 else x if self.batch_first else x.transpose(0, 1)
        return x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _beside(self, x: Tensor, row: Tensor | None) -> Tensor:
        """Return keys, or values, with one more at the end that every text has."""
        assert row is not None, "torch makes both or none"
        one = row.reshape(1, self.num_heads, 1, -1).expand(len(x), -1, -1, -1)
        return torch.cat([x, one], 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, (batch, heads or 1, queries, keys); the keys that were added are seen by all."""
        total = None
        if attention is not None:
            attention = _additive(attention, q)
            heads = (1, 1) if attention.ndim == 2 else (len(q), self.num_heads)
            total = attention.reshape(*heads, *attention.shape[-2:])
        if padding is not None:
            hidden = _additive(padding, q).reshape(len(q), 1, 1, -1)
            total = hidden if total is None else total + hidden
        if total is None:
            return None
        return F.pad(total, (0, k.shape[2] - total.shape[-1])).expand(len(q), -1, q.shape[2], -1)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers that are added to scores: of a bool one, True hides."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
