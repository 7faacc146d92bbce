"""Inputs at chosen shapes, made from a program's example inputs, with what the program in memory answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.lower.base import Runner
from lrc.program import Inputs
from lrc.verify.runner import run

SHAPES: tuple[Mapping[str, int], ...] = ({"batch": 1, "sequence": 9}, {"batch": 3, "sequence": 20})


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


def make_cases(runner: Runner, inputs: Inputs, *, dynamic: bool = True, seed: int = 0) -> list[Case]:
    """Return a case for each of two shapes; the last one has padding where there is an attention mask.

    dynamic: False keeps the shape of the examples and varies the values alone, for an artifact of fixed shape.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for i, shape in enumerate(SHAPES):
        made = resized(inputs, sizes_for(inputs, shape, i) if dynamic else {}, generator)
        if i == len(SHAPES) - 1:
            made = with_padding(made)
        cases.append(Case(made, run(runner, made)))
    return cases


def sizes_for(inputs: Inputs, shape: Mapping[str, int], number: int) -> dict[str, int]:
    """Return a size for every dynamic name, within its bound; names that `shape` lacks get another size in every case."""
    names = sorted({name for dims in inputs.dynamic.values() for name in dims.values()})
    return {name: min(shape.get(name, 4 + 3 * number + i), inputs.largest.get(name, 2**31)) for i, name in enumerate(names)}


def resized(inputs: Inputs, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return inputs of the given dynamic sizes, drawn anew from the values of the examples; positions stay in order."""
    made = {}
    for name, example in inputs.examples.items():
        value = example.detach().cpu()
        for dim, size_name in inputs.dynamic.get(name, {}).items():
            old = value.shape[dim]
            size = sizes.get(size_name, old)
            in_order = name == "position_ids"
            index = torch.arange(size) % old if in_order else torch.randint(old, (size,), generator=generator)
            value = value.index_select(dim, index)
        made[name] = value.clone(memory_format=torch.contiguous_format)  # two cases in one memory cannot be stored
    return made


def with_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with the last third of the first sample masked, where there is a mask of (batch, sequence)."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < 3:
        return inputs
    mask = mask.clone()
    mask[0, -(mask.shape[1] // 3) :] = 0
    return inputs | {"attention_mask": mask}


def save_cases(cases: Sequence[Case]) -> dict[str, Tensor]:
    """Return the inputs of all cases as one mapping of tensors, to be stored."""
    return {f"{i}/{name}": value for i, case in enumerate(cases) for name, value in case.inputs.items()}
