"""A branch that is no linear map: down to a few features, an activation, up again, added to what came in."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.activation import ACTIVATIONS
from lrc.maps.base import Affine, Cost, LinearMap, Structure, apply_slot, slot_shape
from lrc.maps.composites import Composite


class Bottleneck(Composite):
    """x -> x + up(activation(down(x))) + bias, for rows of features. It stands for no weight, so nothing folds it away.

    Source: Houlsby et al. (2019), arXiv:1902.00751, without the layer norms.
    """

    word: ClassVar[str] = "bottleneck"

    def __init__(
        self,
        up: Tensor | LinearMap,
        down: Tensor | LinearMap,
        activation: str = "gelu_new",
        bias: Tensor | None = None,
        names: Sequence[str] = ("up", "down"),
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.hold(names, (up, down))
        self.activation = activation
        shapes = [slot_shape(slot) for slot in self.slots]
        if shapes[0] != shapes[1][::-1]:
            raise ValueError(f"a bottleneck goes down and up again, which the shapes {shapes[::-1]} do not")
        self.out_features = self.in_features = shapes[0][0]
        self.set_bias(bias)

    def obstacle(self) -> str:
        """Name the activation."""
        return f"the activation `{self.activation}` stands between the two projections of an adapter"

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., features)."""
        up, down = self.slots
        return x + apply_slot(up, ACTIVATIONS[self.activation](apply_slot(down, x, None, context)), self.bias, context)

    def exact(self) -> Affine:
        """Raise TypeError: there is no weight."""
        raise TypeError(f"{self!r} has no dense form: {self.obstacle()}")

    def cost(self, tokens: int = 1) -> Cost:
        """Return the sum over the projections, and one FLOP an activation and an added input."""
        inner = slot_shape(self.slots[1])[0]
        return super().cost(tokens) + Cost(0, 0, tokens * (inner + self.in_features))

    def structure(self) -> Structure:
        """Return the structures of the projections and the activation."""
        return super().structure() | {"activation": self.activation}

    @classmethod
    def restored(cls, structure: Structure) -> "Bottleneck":
        """Return an uninitialised map."""
        up, down = structure["parts"]
        made = cls(up, down, structure["activation"], names=structure["names"])
        if structure["bias"]:
            made.set_bias(torch.empty(made.out_features))
        return made

    def __repr__(self) -> str:
        up, down = self.slots
        sizes = slot_shape(down)
        kind = type(down).__name__ if isinstance(down, LinearMap) else "Dense"
        return f"Bottleneck[{sizes[1]},{sizes[0]},{slot_shape(up)[0]}; {kind}, {self.activation}]{self.mark()}"
