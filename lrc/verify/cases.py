"""Inputs at a chosen shape, made from a program's example inputs, with what the program in memory answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lrc.verify.runner import Runner, run

Shape = Mapping[str, int]

SHAPES: tuple[Shape, ...] = ({"batch": 1, "sequence": 9}, {"batch": 3, "sequence": 20})


class ExampleInputs(Protocol):
    """The part of a program's inputs that is needed here.

    examples: one tensor an input; dynamic: for each input, which of its dimensions go by which name.
    """

    @property
    def examples(self) -> Mapping[str, Tensor]:
        """One example of every input."""

    @property
    def dynamic(self) -> Mapping[str, Mapping[int, str]]:
        """Input name -> dimension -> name of the dynamic size (`batch`, `sequence`)."""


@dataclass(frozen=True)
class Case:
    """One set of inputs and the outputs that the program in memory gives for it."""

    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def shape(self) -> str:
        """The shapes of the inputs, in words."""
        sizes = dict.fromkeys("x".join(map(str, t.shape)) or "scalar" for t in self.inputs.values())
        return ", ".join(sizes)


def make_cases(
    runner: Runner, inputs: ExampleInputs, *, shapes: Sequence[Shape] = SHAPES, dynamic: bool = True, seed: int = 0
) -> list[Case]:
    """Return a case for each shape; the last one has padding where there is an attention mask.

    dynamic: False keeps the shape of the examples and varies the values alone, for an artifact of fixed shape.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for i, shape in enumerate(shapes):
        made = resize(inputs, shape if dynamic else {}, generator)
        if i == len(shapes) - 1:
            made = with_padding(made)
        cases.append(Case(made, run(runner, made)))
    return cases


def resize(inputs: ExampleInputs, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Return inputs of the given dynamic sizes; every value is one that the examples hold, positions stay in order."""
    made = {}
    for name, example in inputs.examples.items():
        value = example.detach().cpu()
        for dim, old in enumerate(value.shape):
            size = shape.get(inputs.dynamic.get(name, {}).get(dim, ""), old)
            if name == "position_ids":
                index = torch.arange(size) % old
            else:
                index = torch.randint(old, (size,), generator=generator)
            value = value.index_select(dim, index) if moves(inputs, name, dim) else value
        made[name] = value.contiguous()
    return made


def moves(inputs: ExampleInputs, name: str, dim: int) -> bool:
    """Say whether a dimension is one of samples or positions, along which values may be drawn anew."""
    return dim in inputs.dynamic.get(name, {})


def with_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with the last third of the first sample masked, where there is a mask of (batch, sequence)."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < 3:
        return inputs
    mask = mask.clone()
    mask[0, -(mask.shape[1] // 3) :] = 0
    return inputs | {"attention_mask": mask}
