"""MoDeGPT: the linears of an MLP or an attention lose the same features, and the one that reads them makes up for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import LOSS_UNIT, Need, solver
from lrc.solvers.checks import check
from lrc.solvers.fisher import FocusOptions, focused
from lrc.solvers.groups import Grouping, GroupOptions, GroupTerms, Member, Part, Places, WeightGroup
from lrc.solvers.inputs import input_mean, input_moment
from lrc.solvers.ladder import Root, identity, root
from lrc.solvers.terms import eigenvectors, storage_dtype
from lrc.solvers.whitened import UNIT

ROUNDS = 16  # in which features are dropped by their saliency, which is then computed anew


class ModularSolver(GroupOptions, FocusOptions):
    """Modules in place of matrices: fewer neurons of an MLP, fewer features of an attention's heads."""

    type: Literal["modular"] = "modular"
    metric: Literal["loss", "outputs"] = Field(
        default="loss",
        description="What an error of a module's output counts: as the loss sees it in second order, or the same in all "
        "directions (the paper).",
    )
    select: Literal["saliency", "leverage"] = Field(
        default="saliency",
        description="Which neurons of an MLP stay: those whose loss cannot be made up for by the others, or those of the largest "
        "ridge leverage scores (the paper).",
    )
    damping_in: float = Field(
        default=1e-2, ge=0, description="Added to the diagonal of activations' second moment, of its mean."
    )
    damping_out: float = Field(default=1.0, ge=0, description="Added to the diagonal of gradients' second moment, of its mean.")
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS, Need.GRADIENTS})
    grouping: ClassVar[Grouping] = Grouping.MODULES
    form: ClassVar[str] = "modular"

    def cut(self, terms: GroupTerms, rank: int) -> Sequence[Part]:
        """Return the linears with the first `rank` units: neurons of an MLP, features of values, pairs of queries and keys."""
        tensors, facts = terms.tensors, terms.facts
        made = [_written(terms, i, rank * facts[f"rows{i}"]) for i in range(facts["writers"])]
        if not facts["reads"]:
            return made
        count = rank * facts["reads"]
        solved = torch.linalg.solve_triangular(
            tensors["L"][:count, :count].double(), tensors["ML"][:, :count].double(), upper=False, left=False
        )
        bias = tensors.get("reader_bias")
        if "mean" in tensors:
            shift = tensors["target"] - solved @ tensors["mean"][:count]
            bias = shift if bias is None else shift + bias
        places, order = tensors["reads"][:count].sort()
        reader = solved[:, order].to(tensors["ML"].dtype)
        return [*made, Part((reader, Places(places, facts["width"], spread=False)), bias)]


def _written(terms: GroupTerms, writer: int, count: int) -> Part:
    """Return the linear that gives its first `count` rows, each at its place."""
    tensors = terms.tensors
    places, order = tensors[f"places{writer}"][:count].sort()
    bias = tensors.get(f"bias{writer}")
    where = Places(places, terms.facts[f"size{writer}"], spread=True)
    return Part((where, tensors[f"W{writer}"][:count][order]), None if bias is None else bias[:count][order])


@solver(ModularSolver)
def modular(group: WeightGroup, max_rank: int | None, options: ModularSolver, generator: torch.Generator) -> GroupTerms:
    """Return the units of a module in the order in which they are kept, and the least loss with the first r of them.

    mlp: writers (d_ff, in_features) and the reader (out_features, d_ff). Neurons are selected, and the reader is the least
    squares of its own output on those that stay: W[:, J]' = W C[:, J] C[J, J]⁻¹, C = E[z zᵀ] of what it reads. vo: each head's
    values turn into the directions of W_o z that cost most, with C its block of E[z zᵀ] (for heads that share values, the mean
    of their blocks); the best ones of all heads are kept, and W_o is the least squares as in an MLP. qk: features of queries
    and keys are kept by |q_j| |k_j| in the mean square, those together that a rotary embedding turns.
    With C = L Lᵀ in the order of the units, the loss with the first r is the sum over later columns of |Kᵀ W L|², K Kᵀ the
    output gradients' second moment; in nats per token with `metric: loss`. Of queries and keys it is that of the dropped
    features, 1/2 sum of G ∘ C, the mean of both sides. Computed in float64.
    Source: Lin et al. (2025), MoDeGPT, arXiv:2408.09632, algorithms 1 (MLP, Nyström), 2 (queries and keys, CR) and 3 (values and
    output, SVD). Departures: C of values is that of what W_o reads, behind the softmax, where the paper takes the block's
    input; heads may keep different numbers of features; saliency (Hassibi & Stork 1992, optimal brain surgeon) selects neurons
    unless `select: leverage`; a reader with a bias keeps the mean of what is dropped; a budget takes the place of their
    block influence.
    """
    for member in group.members:
        check(member.weight, member.bias, member.moments, max_rank or 1, options.needs)
    if options.metric == "loss":
        focus = float(options.settled(logits=True).focus)
        members = tuple(replace(member, moments=focused(member.moments, focus)) for member in group.members)
        group = replace(group, members=members)
    if group.kind == "qk":
        return queries_and_keys(group, options)
    return read_back(group, options)


def read_back(group: WeightGroup, options: ModularSolver) -> GroupTerms:
    """Decompose an MLP, or values and output."""
    *writers, reader = group.members
    center = reader.bias is not None
    C = input_moment(reader.moments, center)
    notes: tuple[str, ...] = ()
    W, K = reader.weight.double(), _left(reader, options)
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


def _left(member: Member, options: ModularSolver) -> Root:
    """Return the root of what an error of a member's output costs."""
    rows = member.weight.shape[0]
    if options.metric == "outputs":
        eye = identity(rows, torch.empty(0, dtype=torch.float64))
        return Root(eye, eye)
    if member.moments.fisher is None:
        raise SolverError("moments.fisher", expected="the second moment of the output gradients", got="none")
    return root(member.moments.fisher, "fisher", options.damping_out)


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
    return torch.block_diag(*turns), torch.block_diag(*backs)


def _repeated(turn: Tensor, size: int, heads: int) -> Tensor:
    """Return the turn of every reading head: that of the head whose values it shares."""
    blocks = [turn[i : i + size, i : i + size] for i in range(0, len(turn), size)]
    return torch.block_diag(*(block for block in blocks for _ in range(heads)))


def _units(group: WeightGroup) -> Tensor:
    """Return, for every feature of the values, the columns of the reader that see it, (kv_heads * size, heads / kv_heads)."""
    size, kv_heads = group.facts["size"], group.facts["kv_heads"]
    heads = group.facts["heads"] // kv_heads
    columns = torch.arange(kv_heads * heads * size).view(kv_heads, heads, size)
    return columns.transpose(1, 2).reshape(kv_heads * size, heads)


def _order(KW: Tensor, C: Tensor, ridge: Tensor, units: Tensor, options: ModularSolver) -> Tensor:
    """Return the units in the order in which they are kept, (units,): the last one is the first that goes."""
    if options.select == "leverage":
        level = float(ridge.diagonal().mean() - C.diagonal().mean())
        scores = 1 - level * torch.linalg.inv(ridge).diagonal()
        return scores[units].sum(1).argsort(descending=True, stable=True)
    inverse: Tensor = torch.linalg.inv(ridge)
    left, gone = torch.arange(len(units)), []
    rows = torch.arange(len(C))  # what is left of the columns
    step = max(1, -(-len(units) // ROUNDS))
    while len(left) > 1:
        at = torch.searchsorted(rows, units[left].sort(1)[0])
        blocks = inverse[at[:, :, None], at[:, None, :]]
        errors = KW.T[at]
        scores = (torch.linalg.solve(blocks, errors) * errors).sum((1, 2))
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


def queries_and_keys(group: WeightGroup, options: ModularSolver) -> GroupTerms:
    """Decompose queries and keys: which features, or turned pairs of them, stay."""
    q, k = group.members
    facts = group.facts
    size, kv_heads, together = facts["size"], facts["kv_heads"], facts["together"]
    heads = facts["heads"] // kv_heads
    inside = _turned_together(facts)  # (units of a head, together)
    key = (torch.arange(kv_heads)[:, None, None] * size + inside).flatten(0, 1)
    shared = torch.arange(kv_heads * heads).view(kv_heads, 1, heads, 1) * size
    query = (shared + inside[None, :, None, :]).flatten(0, 1).flatten(1)
    outputs = [_output_moment(member) for member in (q, k)]
    squares = [C.diagonal().clamp(min=0) for C in outputs]
    of_query = squares[0][query].view(len(query), heads, together)
    scores = (of_query[..., :, None] * squares[1][key][:, None, None, :]).sum((1, 2, 3)).sqrt()
    order = scores.argsort(descending=True, stable=True)
    losses = torch.zeros(len(order) + 1, dtype=torch.float64)
    notes: tuple[str, ...] = ()
    for member, C, units in zip((q, k), outputs, (query, key), strict=True):
        K = _left(member, options)
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
