"""The modules whose last linear makes up for what is dropped: an MLP by its neurons, values and output by their features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.solvers.base import LOSS_UNIT
from lrc.solvers.groups import GroupTerms, WeightGroup
from lrc.solvers.inputs import input_mean, input_moment
from lrc.solvers.ladder import identity
from lrc.solvers.modular_loss import output_root
from lrc.solvers.terms import eigenvectors, storage_dtype
from lrc.solvers.whitened import UNIT

if TYPE_CHECKING:
    from lrc.solvers.modular import ModularSolver

ROUNDS = 16  # in which features are dropped by their saliency, which is then computed anew


def read_back(group: WeightGroup, options: "ModularSolver") -> GroupTerms:
    """Decompose an MLP, or values and output."""
    *writers, reader = group.members
    center = reader.bias is not None
    C = input_moment(reader.moments, center)
    notes: tuple[str, ...] = ()
    W, K = reader.weight.double(), output_root(reader, options)
    mean = input_mean(reader.moments) if center else None
    width = C.shape[0]
    weights = [member.weight.double() for member in writers]
    biases = [None if member.bias is None else member.bias.double() for member in writers]
    ridge = _ridge(C, options.damping_in)
    if group.kind == "vo":
        turn, back = _turns(K.apply(W.T).T, ridge, group)
        weights, biases = [turn @ w for w in weights], [None if b is None else turn @ b for b in biases]
        heads = group.facts["heads"] // group.facts["kv_heads"]
        size = group.facts["size"]
        wide = _repeated(turn, size, heads)
        C, W = wide @ C @ wide.T, W @ _repeated(back, size, heads)
        mean = None if mean is None else wide @ mean
        ridge = _ridge(C, options.damping_in)
        units = _units(group)
    else:
        units = torch.arange(width)[:, None]
    order = _order(K.apply(W.T).T, C, ridge, units, options)
    places, reads = _places(order, units, group)
    columns = units[order].flatten()
    L, more = _factor(ridge[columns][:, columns])
    ML = W[:, columns] @ L
    errors = K.apply(ML.T).T.square().sum(0).view(len(order), -1).sum(1)
    scale = (0.5 if options.metric == "loss" else 1.0) * K.weight
    losses = torch.cat([errors.flip(0).cumsum(0).flip(0), errors.new_zeros(1)]) * scale
    dtype = storage_dtype(reader.weight)
    tensors = {"ML": ML.to(dtype), "L": L.to(dtype), "reads": reads}
    facts = {"writers": len(writers), "reads": units.shape[1], "width": width}
    if mean is not None:
        tensors |= {"mean": mean[columns], "target": W @ mean}
    if reader.bias is not None:
        tensors["reader_bias"] = reader.bias
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors |= {f"W{i}": weight[order].to(dtype), f"places{i}": places}
        tensors |= {} if bias is None else {f"bias{i}": bias[order]}
        facts |= {f"rows{i}": 1, f"size{i}": len(order)}
    unit = LOSS_UNIT if options.metric == "loss" else UNIT
    return GroupTerms(losses, tensors, facts, unit, K.notes + notes + more)


def _ridge(C: Tensor, damping: float) -> Tensor:
    """Return C with its damping on the diagonal."""
    level = float(C.diagonal().mean())
    return C + (damping * level if level > 0 else 1.0) * identity(len(C), C)


def _factor(C: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Return the lower Cholesky factor of a damped moment."""
    L, info = torch.linalg.cholesky_ex(C)
    if int(info) == 0:
        return L, ()
    C = C + 1e-8 * float(C.diagonal().mean()) * identity(len(C), C)
    return torch.linalg.cholesky(C), ("gram is singular: damped by 1e-08 of its mean",)


def _turns(KW: Tensor, C: Tensor, group: WeightGroup) -> tuple[Tensor, Tensor]:
    """Return the turn of every shared head into the directions that cost most, and its inverse, both block by block.

    KW: what errors of the reader's inputs cost, (out_features, heads * size). C: damped, (heads * size, heads * size).
    """
    size, kv_heads = group.facts["size"], group.facts["kv_heads"]
    heads = group.facts["heads"] // kv_heads
    turns, backs = [], []
    for g in range(kv_heads):
        parts = [slice((g * heads + h) * size, (g * heads + h + 1) * size) for h in range(heads)]
        block: Tensor = torch.stack([C[part, part] for part in parts]).mean(0)
        L = torch.linalg.cholesky(block)
        D = torch.cat([KW[:, part] for part in parts]) @ L
        V = eigenvectors(D.T @ D)
        turns.append(torch.linalg.solve_triangular(L, V.T, upper=False, left=False))
        backs.append(L @ V)
    return blocks(turns), blocks(backs)


def _repeated(turn: Tensor, size: int, heads: int) -> Tensor:
    """Return the turn of every reading head: that of the head whose values it shares."""
    parts = [turn[i : i + size, i : i + size] for i in range(0, len(turn), size)]
    return blocks([part for part in parts for _ in range(heads)])


def blocks(parts: Sequence[Tensor]) -> Tensor:
    """Return the matrix of square parts of one size along the diagonal."""
    size = len(parts[0])
    made = parts[0].new_zeros(size * len(parts), size * len(parts))
    for i, part in enumerate(parts):
        made[i * size : (i + 1) * size, i * size : (i + 1) * size] = part
    return made


def _units(group: WeightGroup) -> Tensor:
    """Return, for every feature of the values, the columns of the reader that see it, (kv_heads * size, heads / kv_heads)."""
    size, kv_heads = group.facts["size"], group.facts["kv_heads"]
    heads = group.facts["heads"] // kv_heads
    columns = torch.arange(kv_heads * heads * size).view(kv_heads, heads, size)
    return columns.transpose(1, 2).reshape(kv_heads * size, heads)


def _order(KW: Tensor, C: Tensor, ridge: Tensor, units: Tensor, options: "ModularSolver") -> Tensor:
    """Return the units in the order in which they are kept, (units,): the last one is the first that goes."""
    if options.select == "leverage":
        level = float(ridge.diagonal().mean() - C.diagonal().mean())
        scores = 1 - level * torch.linalg.inv(ridge).diagonal()
        found: Tensor = scores[units].sum(1).argsort(descending=True, stable=True)
        return found
    inverse: Tensor = torch.linalg.inv(ridge)
    left, gone = torch.arange(len(units)), []
    rows = torch.arange(len(C))  # what is left of the columns
    step = max(1, -(-len(units) // ROUNDS))
    while len(left) > 1:
        at = torch.searchsorted(rows, units[left].sort(1)[0])
        among = inverse[at[:, :, None], at[:, None, :]]
        errors = KW.T[at]
        scores = (torch.linalg.solve(among, errors) * errors).sum((1, 2))
        weakest = scores.argsort(stable=True)[: min(step, len(left) - 1)]
        gone += left[weakest].tolist()
        out = at[weakest].flatten()
        stay = torch.ones(len(rows), dtype=torch.bool)
        stay[out] = False
        solved = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])
        KW = KW[:, stay] - KW[:, out] @ solved
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ solved
        rows = rows[stay]
        kept = torch.ones(len(left), dtype=torch.bool)
        kept[weakest] = False
        left = left[kept]
    return torch.tensor([*left.tolist(), *reversed(gone)])


def _places(order: Tensor, units: Tensor, group: WeightGroup) -> tuple[Tensor, Tensor]:
    """Return where the writers put the units in order, and where the reader finds them: a head's first ones are used first."""
    if group.kind == "mlp":
        return order, order
    size = group.facts["size"]
    used = [0] * group.facts["kv_heads"]
    places = []
    for unit in order.tolist():
        head = unit // size
        places.append(head * size + used[head])
        used[head] += 1
    found = torch.tensor(places)
    return found, units[found].flatten()
