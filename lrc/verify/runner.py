"""Running anything that takes named inputs: a program in memory, a reloaded folder, a package, an ONNX file."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrc.lower.base import Runner


def run(runner: Runner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run once without gradients; return the outputs as tensors on the CPU, whatever the runner works with."""
    with torch.no_grad():
        outputs = runner(**inputs)
    return {name: torch.as_tensor(value).detach().cpu() for name, value in outputs.items()}
