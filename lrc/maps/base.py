"""What every map is: an affine function `y = weight @ x + bias` with a known cost."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


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


class LinearMap(nn.Module):
    """An affine map from `in_features` to `out_features`.

    `forward(x, **context)` takes (..., in_features) to (..., out_features); `context` holds graph values that some maps
    need at run time. `dense()` and `cost()` of a composite follow from its parts.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply the map to (..., in_features)."""
        raise TypeError(f"{type(self).__name__} does not say how it is applied")

    def dense(self) -> Affine:
        """Return the weight and bias this map stands for, in its own dtype, multiplied out in float64."""
        raise TypeError(f"{type(self).__name__} has no dense form")

    def cost(self, tokens: int = 1) -> Cost:
        """Return what the map stores, and its FLOPs for `tokens` rows (a multiply-add counts 2)."""
        raise TypeError(f"{type(self).__name__} does not say what it costs")
