"""A weight in blocks of rows, each of which reads inputs of its own: every block is decomposed alone, to the same rank."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, Solve, SolverOptions
from lrc.solvers.svd import SvdSolver, svd

OF_INPUTS = ("gram", "mean", "weighted_gram", "weighted_mean", "cross", "dense_mean", "magnitudes")  # one entry a group
SHOWN = 8


def solve_blocks(
    solve: Solve,
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: SolverOptions,
    generator: torch.Generator,
    groups: int,
) -> Decomposition:
    """Return the terms of all blocks: term i is term i of every block, and loses what these lose together.

    weight: (out_features, in_features), group after group, in_features those of one group. moments: those of inputs with a
    leading dimension of groups, `fisher` of all outputs, of which the blocks on the diagonal count,
    or those blocks stacked. max_rank: of a block.
    In the result A is (rank, groups, in_features) and mean (groups, in_features). Raises what the solver raises.
    A block that read nothing while calibrating (an expert that no row was sent to) gets the terms of its weight alone
    (`svd`); it counts for nothing in the loss, and a note names it.
    """
    weights = weight.chunk(groups)
    biases: Sequence[Tensor | None] = [None] * groups if bias is None else bias.chunk(groups)
    unread = [place for place, seen in enumerate(of_groups(moments, groups)) if _reads_nothing(seen)]
    unread = unread if len(unread) < groups else []  # then the solver itself says so
    parts = []
    for place, (W, b, seen) in enumerate(zip(weights, biases, of_groups(moments, groups), strict=True)):
        if place in unread:
            terms = svd(W, b, Moments(), max_rank, SvdSolver(), generator)
            parts.append(replace(terms, scale=0.0))
        else:
            parts.append(solve(W, b, seen, max_rank, options, generator))
    return _noted(joined(_alike(parts, unread)), unread, groups)


def _reads_nothing(seen: Moments) -> bool:
    return seen.gram is not None and not bool(seen.gram.any())


def _alike(parts: Sequence[Decomposition], unread: Sequence[int]) -> list[Decomposition]:
    """Return the parts with those of `unread` told in the unit of the others, and with a mean where the others have one."""
    first = next(part for place, part in enumerate(parts) if place not in unread)
    made = list(parts)
    for place in unread:
        own = replace(parts[place], unit=first.unit)
        if first.mean is not None and first.target is not None:
            own = replace(own, mean=torch.zeros_like(first.mean), target=torch.zeros_like(first.target))
        made[place] = own
    return made


def _noted(made: Decomposition, unread: Sequence[int], groups: int) -> Decomposition:
    if not unread:
        return made
    names = ", ".join(map(str, unread[:SHOWN])) + (", …" if len(unread) > SHOWN else "")
    note = f"{len(unread)} of {groups} blocks (numbers {names}) read nothing in the calibration: by the SVD of their weights"
    return replace(made, notes=(*made.notes, note))


def of_groups(moments: Moments, groups: int) -> Iterator[Moments]:
    """Yield the moments of each group."""
    measured = {name: value for name in OF_INPUTS if (value := getattr(moments, name)) is not None}
    for group in range(groups):
        own = replace(moments, **{name: value[group] for name, value in measured.items()})
        if moments.fisher is not None:
            rows = slice(group * len(moments.fisher) // groups, (group + 1) * len(moments.fisher) // groups)
            own = replace(own, fisher=moments.fisher[group] if moments.fisher.ndim == 3 else moments.fisher[rows, rows])
        if moments.weight_fisher is not None:
            own = replace(own, weight_fisher=moments.weight_fisher.chunk(groups)[group])
        yield own


def joined(parts: Sequence[Decomposition]) -> Decomposition:
    """Return the decompositions of the groups as one."""
    terms = min(len(part.S) for part in parts)
    squares = sum(part.scale * part.S[:terms].double().square() for part in parts)
    assert isinstance(squares, Tensor)
    rest = sum(part.scale * (part.remainder + float(part.S[terms:].double().square().sum())) for part in parts)
    return Decomposition(
        B=torch.cat([part.B[:, :terms] for part in parts]),
        A=torch.stack([part.A[:terms] for part in parts], 1),
        S=squares.sqrt(),
        remainder=rest,
        unit=parts[0].unit,
        bias=_each(parts, "bias", stacked=False),
        mean=_each(parts, "mean", stacked=True),
        target=_each(parts, "target", stacked=False),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _each(parts: Sequence[Decomposition], name: str, *, stacked: bool) -> Tensor | None:
    """Return a vector of all groups, one after the other or stacked; None where there is none."""
    found: list[Tensor] = [value for part in parts if (value := getattr(part, name)) is not None]
    if len(found) < len(parts):
        return None
    return torch.stack(found) if stacked else torch.cat(found)
