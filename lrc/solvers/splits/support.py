"""Which entries of a matrix a sparse part keeps."""

import re
from typing import Annotated

import torch
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from torch import Tensor

N_OF_M = re.compile(r"(\d+):(\d+)")
BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def group_of(pattern: str) -> tuple[int, int] | None:
    """Return (n, m) of an `n:m`, else None."""
    found = N_OF_M.fullmatch(pattern)
    return (int(found[1]), int(found[2])) if found else None


def block_of(pattern: str) -> tuple[int, int] | None:
    """Return (rows, columns) of a block such as `16x16`, else None."""
    found = BLOCK.fullmatch(pattern)
    return (int(found[1]), int(found[2])) if found else None


def stored_as(pattern: str) -> str:
    """Return the pattern that the support of a sparse map has: entries chosen row by row are stored as single ones."""
    return "all" if pattern == "rows" else pattern


def density_of(pattern: str) -> float | None:
    """Return the share of entries that an `n:m` keeps, else None."""
    group = group_of(pattern)
    return None if group is None else group[0] / group[1]


def check_pattern(pattern: str) -> str:
    """Return a pattern that is one."""
    group = group_of(pattern)
    if pattern not in ("all", "rows") and block_of(pattern) is None and not (group and 0 < group[0] < group[1] <= 256):
        raise PydanticCustomError(
            "pattern", 'expected `all`, `rows`, `n:m` with n < m <= 256, such as "2:4", or blocks, such as "16x16"'
        )
    return pattern


Pattern = Annotated[
    str,
    AfterValidator(check_pattern),
    WithJsonSchema({"anyOf": [{"enum": ["all", "rows"]}, {"type": "string", "pattern": r"^\d+[:x]\d+$"}]}),
]


def strongest(scores: Tensor, pattern: str, density: float) -> Tensor:
    """Return where the largest `scores` (out_features, in_features) stand, as bool; of equal ones the first.

    density: share of all entries (`all`), of every row (`rows`), or of all blocks (`16x16`: those with the largest sums of
    scores, those over the edge of the matrix counted whole), rounded down; an `n:m` says its own. Inputs beyond the last whole
    group of m are a group of their own, with no more than its share.
    """
    rows, columns = scores.shape
    group = group_of(pattern)
    if group is not None:
        n, m = group
        short = -columns % m
        padded = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        kept = _largest(padded.reshape(rows, -1, m), n).reshape(rows, -1)[:, :columns]
        if short:
            rest = m - short
            kept[:, columns - rest :] = _largest(scores[:, columns - rest :], max(1, n * rest // m))
        return kept
    block = block_of(pattern)
    if block is not None:
        down, across = -(-rows // block[0]), -(-columns // block[1])
        padded = torch.nn.functional.pad(scores, (0, across * block[1] - columns, 0, down * block[0] - rows))
        sums = padded.reshape(down, block[0], across, block[1]).sum((1, 3))
        kept = _largest(sums.reshape(1, -1), int(density * down * across + 1e-9)).reshape(down, across)
        return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    if pattern == "rows":
        return _largest(scores, int(density * columns + 1e-9))
    return _largest(scores.reshape(1, -1), int(density * rows * columns + 1e-9)).reshape(rows, columns)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` largest along the last dimension stand."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
