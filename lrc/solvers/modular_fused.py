"""An attention whose queries, keys and values one linear gives: features of all three in one order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.solvers.groups import GroupTerms, Member, Part, Places, WeightGroup, fused_rows
from lrc.solvers.modular_pairs import queries_and_keys
from lrc.solvers.modular_reader import read_back

if TYPE_CHECKING:
    from lrc.solvers.modular import ModularSolver

HALVES = "qk_", "vo_"


def fused_attention(group: WeightGroup, options: "ModularSolver") -> GroupTerms:
    """Decompose the rows of queries and keys, and those of values with the output, and put both in one order.

    The units of both are taken by the loss that one more of them saves, per number that it keeps (of its concave hull, so that
    their own orders stay). At least one of each is kept: rank r stands for r + 1 units.
    Where calibration weighs tokens by the gradients of the linear, they are those of all its rows.
    """
    fused, reader = group.members
    q, k, v = (_rows_of(fused, fused_rows(group.facts, role)) for role in "qkv")
    halves = (
        queries_and_keys(WeightGroup("qk", (q, k), group.facts), options),
        read_back(WeightGroup("vo", (v, reader), group.facts), options),
    )
    shared, width = group.facts["heads"] // group.facts["kv_heads"], fused.weight.shape[1] + (fused.bias is not None)
    sizes = (1 + shared) * group.facts["together"] * width, width + shared * reader.weight.shape[0]
    saved = [_savings(half.losses) / size for half, size in zip(halves, sizes, strict=True)]
    order = torch.cat([part[1:] for part in saved]).argsort(descending=True, stable=True)
    pairs = 1 + torch.cat([torch.zeros(1, dtype=torch.int64), (order < len(saved[0]) - 1).cumsum(0)])
    losses = halves[0].losses[pairs] + halves[1].losses[torch.arange(2, len(pairs) + 2) - pairs]
    tensors: dict[str, Tensor] = {}
    facts = {"fused": 1, "size": len(fused.weight)}
    for name, half, roles in zip(HALVES, halves, ("qk", "v"), strict=True):
        tensors |= {name + key: value for key, value in half.tensors.items()}
        facts |= {name + key: value for key, value in half.facts.items()}
        for i, role in enumerate(roles):
            tensors[f"{name}places{i}"] = fused_rows(group.facts, role)[half.tensors[f"places{i}"]]
    facts |= {f"pairs{rank}": int(count) for rank, count in enumerate(pairs.tolist(), 1)}
    first = halves[0].losses[:1] + halves[1].losses[:1]
    return GroupTerms(
        torch.cat([first, losses]), tensors, facts, halves[0].unit, tuple(dict.fromkeys(halves[0].notes + halves[1].notes))
    )


def cut_fused(terms: GroupTerms, rank: int, cut: Callable[[GroupTerms, int], Sequence[Part]]) -> list[Part]:
    """Return the fused linear and the reader with the first units; cut: of one half alone."""
    pairs = terms.facts[f"pairs{rank}"]
    counts = pairs, rank + 1 - pairs
    made: list[Part] = []
    for name, count in zip(HALVES, counts, strict=True):
        tensors = {key.removeprefix(name): value for key, value in terms.tensors.items() if key.startswith(name)}
        facts = {key.removeprefix(name): value for key, value in terms.facts.items() if key.startswith(name)}
        made += cut(GroupTerms(terms.losses, tensors, facts), count)
    *writers, reader = made
    places, rows, biases = [], [], []
    for part in writers:
        where, weight = part.factors
        assert isinstance(where, Places)
        assert isinstance(weight, Tensor)
        places.append(where.index)
        rows.append(weight)
        biases += [] if part.bias is None else [part.bias]
    index, order = torch.cat(places).sort()
    written = Places(index, terms.facts["size"], spread=True)
    return [Part((written, torch.cat(rows)[order]), torch.cat(biases)[order] if biases else None), reader]


def _rows_of(member: Member, rows: Tensor) -> Member:
    """Return some outputs of a linear as a linear."""
    fisher = member.moments.fisher
    moments = member.moments if fisher is None else replace(member.moments, fisher=fisher[rows][:, rows])
    return Member(member.weight[rows], None if member.bias is None else member.bias[rows], moments)


def _savings(losses: Tensor) -> Tensor:
    """Return what every unit saves, made non-increasing: runs of units that save more later share their mean."""
    runs: list[tuple[float, int]] = []
    for saved in (-losses.diff()).tolist():
        total, count = saved, 1
        while runs and runs[-1][0] / runs[-1][1] < total / count:
            total, count = total + runs[-1][0], count + runs[-1][1]
            runs.pop()
        runs.append((total, count))
    return torch.tensor([total / count for total, count in runs for _ in range(count)], dtype=torch.float64)
