"""An activation between the factors of a product: what makes it more than a product."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, Structure
from lrc.maps.small import Square


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_new, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": F.tanh,
}  # fmt: skip


class Activation(Square):
    """y = activation(x) + bias, number by number. It stands for no weight, so nothing folds across it."""

    word: ClassVar[str] = "activation"

    def __init__(
        self,
        function: str,
        features: int,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        spatial: int = 0,
    ) -> None:
        super().__init__(features, dtype, bias, spatial)
        if function not in ACTIVATIONS:
            raise ValueError(f"unknown activation {function!r}; known: {', '.join(ACTIVATIONS)}")
        self.function = function

    def obstacle(self) -> str:
        """Name the activation."""
        return f"the activation `{self.function}` stands between the factors"

    def change(self, x: Tensor) -> Tensor:
        """Return the activation of every number."""
        return ACTIVATIONS[self.function](x)

    def exact(self) -> Affine:
        """Raise TypeError: there is no weight."""
        raise TypeError(f"{self!r} has no dense form: {self.obstacle()}")

    def cost(self, tokens: int = 1) -> Cost:
        """Return one FLOP a number, beside the bias."""
        return Cost(0, 0, tokens * self.in_features) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the size and the activation."""
        return super().structure() | {"function": self.function}

    @classmethod
    def restored(cls, structure: Structure) -> "Activation":
        """Return a map with an uninitialised bias."""
        size: int = structure["size"]
        bias = torch.empty(size) if structure["bias"] else None
        return cls(structure["function"], size, None, bias, int(structure["spatial"]))

    def __repr__(self) -> str:
        return f"Activation[{self.in_features}; {self.function}]"
