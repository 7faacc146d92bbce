"""Sizes that the user's modules keep as numbers: what they must be where a graph has been cut, found by trying.

A module that splits what it reads at `self.split_size` must split it elsewhere. Which of its numbers a changed size of the
graph came from is not in the graph; so the numbers of the same value, in the module that the node is from, are tried, and
the modules have to agree with the graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lrc.errors import LrcError
from lrc.program.graft import graft
from lrc.program.program import Program

CLOSE = 1e-4  # of the largest output
TRIED = 4  # kinds of numbers that are tried in all combinations
Changes = Mapping[str, Mapping[int, int]]
Kind = tuple[str, str]  # a class and one of its attributes
REASON = "its code has a size that pruning has changed, and none of its numbers is that size alone"


def fit_modules(program: Program, changes: Changes) -> str | None:
    """Find what the attributes of the user's modules must be after a cut. changes: old sizes -> new ones, by module.

    Returns a note on what was found, or None where nothing had to change. Where nothing fits, the program has no place in the
    user's modules any more, and grafting says why.
    """
    model = program.origin.model
    if model is None or any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters()):
        return None
    kinds = _kinds(model, program, changes)
    before = {name: dict(own) for name, own in program.attributes.items()}
    for chosen in _choices(list(kinds)):
        program.attributes = {name: dict(own) for name, own in before.items()}
        for kind in chosen:
            for module, value in kinds[kind].items():
                program.attributes.setdefault(module, {})[kind[1]] = value
        if _agrees(program):
            names = ", ".join(f"{kind}.{attribute}" for kind, attribute in chosen)
            return f"in the user's modules {names} is changed too" if chosen else None
    program.attributes = before
    module = next(iter(changes), program.origin.name)
    program.inserted[module] = REASON
    return f"{module}: {REASON}; the graph runs, by `.module` and as onnx or pt2, not the user's modules"


def _kinds(model: nn.Module, program: Program, changes: Changes) -> dict[Kind, dict[str, int]]:
    """Return the attributes that may hold a changed size: their new values, by module, for every kind."""
    found: dict[Kind, dict[str, int]] = {}
    for name, sizes in changes.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        held = {**vars(module), **program.attributes.get(name, {})}
        for attribute, value in held.items():
            if isinstance(value, int) and not isinstance(value, bool) and value in sizes:
                found.setdefault((type(module).__name__, attribute), {})[name] = sizes[value]
    return found


def _choices(kinds: Sequence[Kind]) -> Iterator[tuple[Kind, ...]]:
    """Yield what to change: nothing, everything, and then every other choice, where these are few."""
    yield ()
    if kinds:
        yield tuple(kinds)
    if len(kinds) <= TRIED:
        for count in range(1, len(kinds)):
            yield from combinations(kinds, count)


def _agrees(program: Program) -> bool:
    """Say whether the user's modules do with the program's maps what the graph does."""
    try:
        model = graft(program).eval()
    except LrcError:
        return True  # there are other reasons why it has no place there, which are told elsewhere
    return same_outputs(program, model)


@torch.no_grad()
def same_outputs(program: Program, model: nn.Module) -> bool:
    """Say whether a module does with a program's example inputs what its graph does."""
    inputs = dict(program.inputs.examples)
    fixed = {name: value for name, value in program.calling.baked.items() if value is not None and name not in inputs}
    expected = list(program(**inputs).values())
    try:
        answer: Any = model(**_as_called(program, inputs), **fixed)
    except Exception:  # a user's own code may raise anything
        return False
    found = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
    same = len(found) == len(expected) and all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
    return same and all(
        float((a - b).abs().max() if a.numel() else 0) <= CLOSE * max(1.0, float(b.abs().max() if b.numel() else 0))
        for a, b in zip(found, expected, strict=True)
        if b.is_floating_point()
    )


def _as_called(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return inputs by the names of the module's own arguments, where the graph calls them by others."""
    return {name: value for name, value in program.inputs.fill(inputs).items() if value is not None}
