"""Batches of named tensors, and how they are made of arrays, of a user's own code, or of token ids."""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.errors import DataError, UsageError

Batch = dict[str, Tensor]
IGNORED = -100  # the label that transformers and torch leave out of a loss


@dataclass(frozen=True)
class Batches:
    """Batches of inputs by name, in order; the same ones every time they are walked through."""

    items: tuple[Batch, ...]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def batches_of(given: Iterable[Any], names: Sequence[str], where: str = "calibration") -> Batches:
    """Return what a user yields as batches: mappings, or tuples (or one tensor) in the order of `names`.

    Raises DataError for something else, and for no batch at all.
    """
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise DataError(where, expected="several batches", got=type(given).__name__, hint="Put one batch into a list")
    items = []
    for made in given:
        if isinstance(made, Tensor):
            made = (made,)
        if isinstance(made, Mapping) and any(isinstance(value, Tensor) for value in made.values()):
            items.append({str(name): value for name, value in made.items() if isinstance(value, Tensor)})
        elif isinstance(made, tuple | list) and made and all(isinstance(value, Tensor) for value in made):
            items.append(dict(zip(names, made, strict=False)))
        else:
            raise DataError(where, expected="batches of tensors, by name or in order", got=type(made).__name__)
    if not items:
        raise DataError(where, expected="at least one batch", got="none")
    return Batches(tuple(items))


def from_factory(path: str, names: Sequence[str], *, allow_code: bool) -> Batches:
    """Call `package.module:factory` for batches. Raises UsageError unless code may run, DataError when it cannot be found."""
    if not allow_code:
        raise UsageError(path, message="a factory runs code of yours", hint="Add `--allow-code` to let it run")
    module, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(path, message=str(error), hint="Is its folder on PYTHONPATH?") from error
    return batches_of(factory(), names, path)


def in_batches(arrays: Mapping[str, Tensor], batch_size: int) -> Batches:
    """Cut arrays of equal first dimension into batches."""
    count = next(iter(arrays.values())).shape[0]
    starts = range(0, count, batch_size)
    return Batches(tuple({name: a[i : i + batch_size] for name, a in arrays.items()} for i in starts))


def of_equal_length(samples: Sequence[Mapping[str, Sequence[int]]], batch_size: int) -> Batches:
    """Group tokenised samples by length, so that nothing is padded; shortest first, then in their own order."""
    groups: dict[int, list[Mapping[str, Sequence[int]]]] = {}
    for sample in samples:
        groups.setdefault(len(sample["input_ids"]), []).append(sample)
    items = []
    for length in sorted(groups):
        group = groups[length]
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            items.append({name: torch.tensor([list(s[name]) for s in part]) for name in part[0]})
    return Batches(tuple(items))


def drawn(count: int, samples: int, seed: int) -> list[int]:
    """Return `samples` of `count` places, without replacement, in ascending order; all of them if there are no more."""
    if samples >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:samples].tolist())
