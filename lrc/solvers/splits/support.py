"""Which entries of a matrix a sparse part keeps."""

import re
from typing import Annotated

import torch
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from torch import Tensor

N_OF_M = re.compile(r"(\d+):(\d+)")


def group_of(pattern: str) -> tuple[int, int] | None:
    """Return (n, m) of an `n:m`, else None."""
    found = N_OF_M.fullmatch(pattern)
    return (int(found[1]), int(found[2])) if found else None


def density_of(pattern: str) -> float | None:
    """Return the share of entries that an `n:m` keeps, else None."""
    group = group_of(pattern)
    return None if group is None else group[0] / group[1]


def check_pattern(pattern: str) -> str:
    """Return a pattern that is one."""
    group = group_of(pattern)
    if pattern not in ("all", "rows") and not (group and 0 < group[0] < group[1]):
        raise PydanticCustomError("pattern", 'expected `all`, `rows` or `n:m` with n < m, such as "2:4"')
    return pattern


Pattern = Annotated[
    str,
    AfterValidator(check_pattern),
    WithJsonSchema({"anyOf": [{"enum": ["all", "rows"]}, {"type": "string", "pattern": r"^\d+:\d+$"}]}),
]


def strongest(scores: Tensor, pattern: str, density: float) -> Tensor:
    """Return where the largest `scores` (out_features, in_features) stand, as bool; of equal ones the first.

    density: share of all entries (`all`), or of every row (`rows`), rounded down; an `n:m` says its own. Inputs beyond the
    last whole group of m are a group of their own, with no more than its share.
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
    if pattern == "rows":
        return _largest(scores, int(density * columns + 1e-9))
    return _largest(scores.reshape(1, -1), int(density * rows * columns + 1e-9)).reshape(rows, columns)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` largest along the last dimension stand."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
