"""What every map is: an affine function `y = weight @ x + bias` with a known cost.

A composite is made of *slots*. A slot is a bare matrix (a parameter of the composite itself, so that the factors of a site
are stored as `<site>.A` and `<site>.B`) or another map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Structure = dict[str, Any]


class Affine(NamedTuple):
    """The weight (out_features, in_features) and bias (out_features,) that a map stands for."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Cost:
    """What a map needs: stored numbers, stored bytes (index vectors counted), and FLOPs for the asked tokens."""

    parameters: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.bytes + other.bytes, self.flops + other.flops)


def gathered(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the features of x (..., features) in the order of `index`; `dim` is the last one.

    Along the second of two dimensions: along the last of three the same gather takes ten times as long on a CPU. A compiler
    or exporter is given the gather alone.
    """
    if x.ndim <= 2 or torch.compiler.is_compiling():
        return x.index_select(dim, index)
    return x.flatten(0, -2).index_select(1, index).reshape(*x.shape[:-1], len(index))


class LinearMap(nn.Module):
    """An affine map from `in_features` to `out_features`.

    `forward(x, **context)` takes (..., in_features) to (..., out_features); `context` holds graph values that some maps
    need at run time. `dense()` and `cost()` of a composite follow from its parts. `word` names the map in a structure.
    """

    word: ClassVar[str]
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply the map to (..., in_features)."""
        raise TypeError(f"{type(self).__name__} does not say how it is applied")

    def exact(self) -> Affine:
        """Return the weight and bias this map stands for, in float64."""
        raise TypeError(f"{type(self).__name__} has no dense form")

    def dense(self) -> Affine:
        """Return the weight and bias this map stands for, in its own dtype, multiplied out in float64."""
        weight, bias = self.exact()
        return Affine(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def matrix(self) -> Tensor:
        """Return the weight of `exact()` in the map's dtype and as a part of the autograd graph."""
        raise TypeError(f"{type(self).__name__} has no dense form with a gradient")

    def cost(self, tokens: int = 1) -> Cost:
        """Return what the map stores, and its FLOPs for `tokens` rows (a multiply-add counts 2, an added bias 1)."""
        raise TypeError(f"{type(self).__name__} does not say what it costs")

    def structure(self) -> Structure:
        """Return the map without its numbers, as plain data that `lrc.maps.restore` reads."""
        raise TypeError(f"{type(self).__name__} does not say how it is stored")

    @classmethod
    def restored(cls, structure: Structure) -> "LinearMap":
        """Return a map of this structure with uninitialised numbers, on the current device and in the current dtype."""
        raise TypeError(f"{cls.__name__} does not say how it is stored")

    def obstacle(self) -> str | None:
        """Return why the map stands for no weight and bias, or None."""
        return f"{type(self).__name__} has no dense form" if type(self).exact is LinearMap.exact else None

    @property
    def spatial(self) -> int:
        """How many dimensions come after the features in what the map takes and gives: 0 for rows, 2 for images."""
        return 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the map's floating numbers."""
        return next(t.dtype for t in self.parameters() if t.is_floating_point())

    @property
    def packed_numbers(self) -> int:
        """How many numbers the map itself stores in another way than as floating tensors, fewer the tensors of their scales."""
        return 0

    def along_features(self, vector: Tensor) -> Tensor:
        """Return a vector (out_features,) in a shape that meets the features of an output."""
        return over(vector, self.spatial)

    def plus(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return an output of the map with `bias` (out_features,) added."""
        return y if bias is None else y + self.along_features(bias)

    def added(self, x: Tensor, bias: Tensor | None, spatial: int, context: Mapping[str, Any]) -> Tensor:
        """Apply the map and add `bias` besides; with rounding once, where the map can."""
        y: Tensor = self(x, **context)
        return y if bias is None else y + over(bias, spatial)

    def set_bias(self, bias: Tensor | None) -> None:
        """Make `bias` (out_features,), or none, what is added last."""
        self.register_parameter("bias", None if bias is None else as_parameter(bias))

    def with_bias(self, bias: nn.Parameter | None) -> "LinearMap":
        """Return a map with another bias that shares every other tensor with this one."""
        twin = type(self).__new__(type(self))
        twin.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, "bias": bias}}
        return twin

    def bias_cost(self, tokens: int) -> Cost:
        """Return what the map's own bias costs."""
        if self.bias is None:
            return Cost()
        return Cost(self.bias.numel(), self.bias.numel() * self.bias.element_size(), tokens * self.bias.numel())

    def mark(self) -> str:
        """Return `*` when nothing in the map is trained, for the one-line text."""
        parameters = list(self.parameters())
        return "*" if parameters and not any(p.requires_grad for p in parameters) else ""


class InParts(LinearMap):
    """A map that keeps its dense weight in parts."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew: for code that asks a linear layer for its `weight` (T5 asks for its dtype).

        A map that stands for no weight gives its shape and dtype alone, on the meta device.
        """
        if self.obstacle() is None:
            return self.dense().weight
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")


Slot = nn.Parameter | LinearMap


def as_parameter(value: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter; one that is a parameter already stays the same object, frozen or not."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=value.is_floating_point())


def as_slot(value: "Tensor | LinearMap") -> Slot:
    """Return a matrix or a map as what a composite holds. A `Dense` without a bias is held as its bare matrix."""
    if isinstance(value, LinearMap):
        return value.weight if value.word == "dense" and value.bias is None else value  # type: ignore[return-value]
    return as_parameter(value)


def slot_shape(slot: Slot) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    if isinstance(slot, LinearMap):
        return slot.out_features, slot.in_features
    return slot.shape[0], slot.shape[1]


def apply_slot(
    slot: Slot, x: Tensor, bias: Tensor | None, context: Mapping[str, Any], spatial: int = 0, inputs: tuple[Any, ...] = ()
) -> Tensor:
    """Apply a slot to what has its features before `spatial` more dimensions, and add `bias`.

    inputs: what a map takes beside x.
    """
    if not isinstance(slot, LinearMap):
        return F.linear(x, slot, bias)
    if not inputs:
        return slot.added(x, bias, spatial, context)
    y: Tensor = slot(x, *inputs, **context)
    return y if bias is None else y + over(bias, spatial)


def over(vector: Tensor, spatial: int) -> Tensor:
    """Return a vector of features as it meets values that have `spatial` more dimensions after their features."""
    return vector.reshape(-1, *(1,) * spatial) if spatial else vector


def slot_weight(slot: Slot) -> Tensor:
    """Return the matrix that a slot stands for, in its own dtype and with its gradient."""
    return slot.matrix() if isinstance(slot, LinearMap) else slot


def slot_exact(slot: Slot) -> Affine:
    """Return what a slot stands for, in float64."""
    return slot.exact() if isinstance(slot, LinearMap) else Affine(slot.detach().double(), None)


def slot_cost(slot: Slot, tokens: int) -> Cost:
    """Return what a slot costs."""
    if isinstance(slot, LinearMap):
        return slot.cost(tokens)
    return Cost(slot.numel(), slot.numel() * slot.element_size(), 2 * tokens * slot.numel())


def slot_structure(slot: Slot) -> Structure | list[int]:
    """Return a slot as plain data: a bare matrix is its two sizes."""
    return slot.structure() if isinstance(slot, LinearMap) else list(slot.shape)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two biases that may be absent."""
    if a is None or b is None:
        return a if b is None else b
    return a + b


def exact_bias(bias: Tensor | None) -> Tensor | None:
    """Return a bias in float64."""
    return None if bias is None else bias.detach().double()
