"""Queries and keys: which features, or pairs of features that are turned together, both of them keep."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.solvers.base import LOSS_UNIT
from lrc.solvers.groups import GroupTerms, Member, WeightGroup
from lrc.solvers.inputs import input_mean, input_moment
from lrc.solvers.modular_loss import output_root
from lrc.solvers.modular_turned import turned
from lrc.solvers.terms import storage_dtype
from lrc.solvers.whitened import UNIT

if TYPE_CHECKING:
    from lrc.solvers.modular import ModularSolver


def queries_and_keys(group: WeightGroup, options: "ModularSolver") -> GroupTerms:
    """Decompose queries and keys: which features, or turned pairs of them, stay."""
    q, k = group.members
    facts = group.facts
    outputs = [_output_moment(member) for member in (q, k)]
    if facts["together"] == 1 and options.queries != "features":
        group = turned(group, outputs, options.damping_in)
        q, k = group.members
        outputs = [_output_moment(member) for member in (q, k)]
    size, kv_heads, together = facts["size"], facts["kv_heads"], facts["together"]
    heads = facts["heads"] // kv_heads
    inside = _turned_together(facts)  # (units of a head, together)
    key = (torch.arange(kv_heads)[:, None, None] * size + inside).flatten(0, 1)
    shared = torch.arange(kv_heads * heads).view(kv_heads, 1, heads, 1) * size
    query = (shared + inside[None, :, None, :]).flatten(0, 1).flatten(1)
    squares = [C.diagonal().clamp(min=0) for C in outputs]
    of_query = squares[0][query].view(len(query), heads, together)
    scores = (of_query[..., :, None] * squares[1][key][:, None, None, :]).sum((1, 2, 3)).sqrt()
    order = scores.argsort(descending=True, stable=True)
    losses = torch.zeros(len(order) + 1, dtype=torch.float64)
    notes: tuple[str, ...] = ()
    for member, C, units in zip((q, k), outputs, (query, key), strict=True):
        K = output_root(member, options)
        notes += K.notes
        columns = units[order].flatten()
        costs = ((K.matrix @ K.matrix.T) * C)[columns][:, columns]
        per = units.shape[1]
        dropped = costs.flip(0, 1).cumsum(0).cumsum(1).diagonal()[per - 1 :: per].flip(0)
        losses[:-1] += 0.5 * K.weight * dropped * (0.5 if options.metric == "loss" else 1.0)
    losses = losses.clamp(min=0).flip(0).cummax(0)[0].flip(0)
    dtype = storage_dtype(q.weight)
    tensors: dict[str, Tensor] = {}
    for i, (member, units) in enumerate(zip((q, k), (query, key), strict=True)):
        rows = units[order].flatten()
        tensors |= {f"W{i}": member.weight[rows].to(dtype), f"places{i}": rows}
        tensors |= {} if member.bias is None else {f"bias{i}": member.bias[rows]}
    numbers = {"writers": 2, "reads": 0, "rows0": heads * together, "rows1": together}
    numbers |= {"size0": len(q.weight), "size1": len(k.weight)}
    unit = LOSS_UNIT if options.metric == "loss" else UNIT
    return GroupTerms(losses, tensors, numbers, unit, notes)


def _turned_together(facts: Mapping[str, int]) -> Tensor:
    """Return the features of a head by units, (units, together): pairs of the rotary part, and pairs of what is left."""
    rotary, size = facts["rotary"], facts["size"]
    if facts["together"] == 1:
        return torch.arange(size)[:, None]
    turned = torch.arange(rotary)
    pairs = turned.view(-1, 2) if facts["interleaved"] else turned.view(2, -1).T
    return torch.cat([pairs, torch.arange(rotary, size).view(-1, 2)])


def _output_moment(member: Member) -> Tensor:
    """Return E[y yᵀ] of y = W x + b."""
    W, C = member.weight.double(), input_moment(member.moments, center=False)
    moment = W @ C @ W.T
    if member.bias is not None:
        b, mean = member.bias.double(), W @ input_mean(member.moments)
        moment = moment + b[:, None] * mean + mean[:, None] * b + b[:, None] * b
    return moment
