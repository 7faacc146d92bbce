"""Adapters as inputs of an ONNX graph: one file serves any adapter of the same shapes; the default ones stand beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.maps import LinearMap, Scale
from lrc.program import Program

BESIDE = "adapters.safetensors"


def adapter_tensors(program: Program) -> dict[str, Tensor]:
    """Return what is trained in a program's adapters, by its name in the graph, the biases of sites left out.

    Raises LowerError where there is none.
    """
    found: dict[str, Tensor] = {}
    for fqn in program.adapters:
        for module, made in program.placed(fqn).items():
            found |= {
                f"{module}.{name}": p.detach() for name, p in made.named_parameters() if p.requires_grad and name != "bias"
            }
    if not found:
        raise LowerError(
            program.origin.name, message="the program has no adapter that could be an input",
            hint="Add a pass `adapt` or `load_adapter`, or leave `adapters: inputs` out",
        )  # fmt: skip
    return found


class ListedInputs(nn.Module):
    """A graph whose inputs are one list, in the order of `names`. The tree of its parameters is the graph's."""

    def __init__(self, graph_module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name, child in graph_module.named_children():
            self.add_module(name, child)
        for name, parameter in graph_module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in graph_module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._graph = (graph_module,)  # in a tuple, so that its parameters do not get a second name

    def forward(self, inputs: Sequence[Tensor]) -> Any:
        """Run the graph."""
        return self._graph[0](**dict(zip(self.names, inputs, strict=True)))


class WithAdapters(nn.Module):
    """A module whose adapters are its first argument, by their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, adapters: Mapping[str, Tensor], *args: Any) -> Any:
        """Run the module with these tensors in the place of its own."""
        return torch.func.functional_call(self.module, dict(adapters), args)


def save_beside(program: Program, path: Path) -> None:
    """Write the default adapters of a graph: float32 where they are bfloat16, as the graph has them."""
    tensors = {name: widened(t).contiguous() for name, t in adapter_tensors(program).items()}
    scales = {fqn: repr(scale_of(program.maps[fqn])) for fqn in program.adapters}
    save_file(tensors, path, metadata={"format": "pt", **{f"scale:{fqn}": scale for fqn, scale in scales.items()}})


def inputs_for(program: Program, beside: Path) -> dict[str, Tensor]:
    """Return the inputs that make an exported graph give what this program gives, whose adapter is another one.

    beside: the file of the default adapters, which says what the graph has: names, shapes, and scales, which are constants
    there; another scale goes into B. Raises LowerError for adapters of other sites, shapes or methods.
    """
    tensors = {name: widened(t) for name, t in adapter_tensors(program).items()}
    with safe_open(beside, "pt") as file:
        wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        scales = {key.removeprefix("scale:"): float(v) for key, v in file.metadata().items() if key.startswith("scale:")}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        raise LowerError(
            odd[0], expected=f"shape {wanted.get(odd[0])}, as the graph has it", got=str(found.get(odd[0])),
            hint="An adapter as input has the sites, the method and the rank of the one that was exported",
        )  # fmt: skip
    for fqn in program.adapters:
        ratio = scale_of(program.maps[fqn]) / scales[fqn]
        for module in program.placed(fqn) if ratio != 1.0 else ():
            names = [name for name in tensors if name.startswith(f"{module}.") and name.endswith((".B", ".up"))]
            if len(names) != 1:
                raise LowerError(fqn, message="the adapter has another scale than the graph, and no factor B to take it")
            tensors[names[0]] = tensors[names[0]] * ratio
    return tensors


def scale_of(made: LinearMap) -> float:
    """Return the product of the constants in a map."""
    scale = 1.0
    for part in made.modules():
        if isinstance(part, Scale):
            scale *= part.scale
    return scale


def widened(tensor: Tensor) -> Tensor:
    """Return bfloat16 as float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
