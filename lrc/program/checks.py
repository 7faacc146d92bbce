"""What is checked of a loaded model, and of the packages that loading needs."""

from typing import Any

import torch
from torch import nn

from lrc.errors import ModelError, UsageError


def check_finite(model: nn.Module, where: str) -> None:
    """Raise ModelError that names the first tensor with a NaN or an infinite value."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{where}: {name}",
                expected="finite numbers",
                got=f"{bad} of {tensor.numel()} that are NaN or infinite",
                hint="The checkpoint is damaged, or was saved after training diverged",
            )


def need_transformers() -> Any:
    """Return the module transformers. Raises UsageError with the line that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "transformers",
            message="this model needs transformers, which is not installed",
            hint="pip install 'lrc-compiler[hf]'",
        ) from error
    return transformers
