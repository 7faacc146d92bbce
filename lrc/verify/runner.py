"""What is evaluated: anything that takes named inputs and returns named outputs."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Runner(Protocol):
    """A program in memory, a reloaded folder, an AOTInductor package or an ONNX file.

    Inputs and outputs are tensors or arrays by name; inputs that may be left out get the defaults of a tokenizer's output
    without padding.
    """

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Run once."""


class ModuleRunner:
    """A module with named inputs whose outputs are a mapping, such as a transformers model, as a runner."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Run the module without gradients; what is not a tensor among its outputs (a cache) is left out."""
        with torch.no_grad():
            return named_tensors(self.module(**inputs))


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors among a module's outputs by name; a bare tensor is `output`, members of a tuple `output_<i>`."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, tuple | list):
        return {f"output_{i}": value for i, value in enumerate(outputs) if isinstance(value, Tensor)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def run(runner: Runner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run once without gradients; return the outputs as tensors on the CPU, whatever the runner works with."""
    with torch.no_grad():
        outputs = runner(**inputs)
    return {name: torch.as_tensor(value).detach().cpu() for name, value in outputs.items()}
