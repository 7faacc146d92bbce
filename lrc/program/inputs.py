"""What a program takes and gives, by name: example tensors and the dimensions that may change."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrc.errors import UsageError

Dynamic = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Inputs:
    """One example of every input, in the order of the graph's placeholders.

    dynamic: input name -> dimension -> name of the dynamic size (`batch`, `sequence`). Dimensions with one name are equal.
    largest: the largest value of a dynamic size, where the model has one (positions of a learned embedding).
    """

    examples: Mapping[str, Tensor]
    dynamic: Dynamic = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)

    def dims(self) -> dict[str, dict[int, Any]]:
        """Return the dynamic dimensions as `torch.export.export` takes them, one entry an input."""
        names = {name for dims in self.dynamic.values() for name in dims.values()}
        made = {name: torch.export.Dim(name, max=self.largest.get(name)) for name in sorted(names)}
        return {name: {dim: made[size] for dim, size in self.dynamic.get(name, {}).items()} for name in self.examples}

    def limits(self, *, static: bool = False) -> dict[str, list[int | list[Any]]]:
        """Return the sizes of every input as plain data: a number, or for a dynamic one its name and largest value or None.

        static: every size is that of the example.
        """
        return {
            name: [
                [dims[dim], self.largest.get(dims[dim])] if dim in dims and not static else size
                for dim, size in enumerate(example.shape)
            ]
            for name, example in self.examples.items()
            for dims in [self.dynamic.get(name, {})]
        }

    def fill(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a value for every input; a missing mask, token type or position gets that of one unpadded text.

        Values are moved to the device of the examples; entries that the program does not take (`labels`) are left out.
        Raises UsageError for an input that is missing.
        """
        made = {name: given[name].to(like.device) for name, like in self.examples.items() if given.get(name) is not None}
        for name in self.examples:
            if name not in made:
                made[name] = self._default(name, made)
        return {name: made[name] for name in self.examples}

    def _default(self, name: str, given: Mapping[str, Tensor]) -> Tensor:
        tokens = given.get("input_ids")
        like = self.examples[name]
        if tokens is not None and name == "attention_mask":
            return torch.ones(tokens.shape, dtype=like.dtype, device=tokens.device)
        if tokens is not None and name == "token_type_ids":
            return torch.zeros(tokens.shape, dtype=like.dtype, device=tokens.device)
        if tokens is not None and name == "position_ids":
            positions = torch.arange(tokens.shape[-1], dtype=like.dtype, device=tokens.device)
            return positions.expand(tokens.shape).contiguous()
        raise UsageError(
            "inputs",
            expected=f"the inputs {', '.join(self.examples)}",
            got=", ".join(given) or "none",
            hint=f"Give `{name}`",
        )


def leading_batch(examples: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Return dimension 0 of every input as `batch`, where all agree on a size of at least 2; else nothing is dynamic."""
    sizes = {t.shape[0] if t.ndim else 0 for t in examples.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        return {}
    return {name: {0: "batch"} for name in examples}


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """Return a name for every leaf of a module's output: its key, `output`, or `output_<i>`; nested names are joined."""
    found: dict[int, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, int):  # a leaf is its place
            found[value] = name or "output"
        elif value is not None:
            for key, part in _members(value, name):
                walk(part, key)

    walk(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), "")
    return [found[i] for i in range(spec.num_leaves)]


def _members(value: Any, name: str) -> list[tuple[str, Any]]:
    """Return the parts of a mapping, a dataclass, a tuple or another tree, with their names."""
    if isinstance(value, Mapping):
        named = dict(value)
    elif is_dataclass(value):
        named = {part.name: getattr(value, part.name) for part in fields(value)}
    elif hasattr(value, "_fields"):
        named = dict(zip(value._fields, value, strict=True))
    else:
        parts = value if isinstance(value, tuple | list) else pytree.tree_leaves(value)
        return [(f"{name or 'output'}_{i}", part) for i, part in enumerate(parts)]
    return [(f"{name}.{key}" if name else str(key), part) for key, part in named.items()]
