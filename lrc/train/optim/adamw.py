"""AdamW and SGD of torch, as the spec names them."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from lrc.train.optim.adam import Adam
from lrc.train.optim.base import OptimizerOptions, Trained, optimizer
from lrc.train.optim.quantized import moment_bytes


class AdamWOptions(OptimizerOptions):
    """`torch.optim.AdamW`."""

    type: Literal["adamw"] = "adamw"
    sharded: ClassVar[bool] = True


class Adam8bitOptions(OptimizerOptions):
    """AdamW with moments of 8 bits."""

    type: Literal["adamw8bit"] = "adamw8bit"
    eps: float = Field(default=1e-6, ge=0, description="Added to the root of the mean square.")

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of two moments in codes."""
        return 2 * moment_bytes(shape.numel(), itemsize, 8)


class SGDOptions(OptimizerOptions):
    """`torch.optim.SGD`."""

    type: Literal["sgd"] = "sgd"
    lr: float = Field(default=1e-2, ge=0, description="Learning rate.")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Of the running mean of the gradients.")
    sharded: ClassVar[bool] = True

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of the momentum, if there is one."""
        return shape.numel() * itemsize if self.momentum else 0

    def arguments(self) -> dict[str, Any]:
        """Return the options without those of Adam."""
        return self.model_dump(exclude={"type", "betas", "eps"})


@optimizer(AdamWOptions)
def adamw(trained: Trained, options: AdamWOptions) -> torch.optim.AdamW:
    """Return torch's AdamW."""
    return torch.optim.AdamW(trained.groups(), **options.arguments())


@optimizer(Adam8bitOptions)
def adamw8bit(trained: Trained, options: Adam8bitOptions) -> Adam:
    """Return AdamW with block-wise quantised moments."""
    return Adam(trained.groups(), state_bits=8, **options.arguments())


@optimizer(SGDOptions)
def sgd(trained: Trained, options: SGDOptions) -> torch.optim.SGD:
    """Return torch's SGD."""
    return torch.optim.SGD(trained.groups(), **options.arguments())
