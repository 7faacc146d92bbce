"""A map whose rows have given lengths: magnitude and direction of a weight, told apart."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Affine, Cost, LinearMap, apply_slot, as_parameter, exact_bias, slot_exact, slot_shape, slot_weight
from lrc.maps.composites import Composite


class RowNorm(Composite):
    """x -> (magnitude / |V|) V x + bias, |V| the lengths of the rows of the inner map's weight V, without gradients.

    magnitude: (out_features,), trained: the lengths of the rows of the weight that the map stands for. The inner map has no
    bias. Source: Liu et al. (2024), arXiv:2402.09353, equations 5 and 11 (the norm is a constant in the backward pass).
    """

    word: ClassVar[str] = "row_norm"

    def __init__(
        self,
        inner: Tensor | LinearMap,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        names: Sequence[str] = ("inner",),
    ) -> None:
        super().__init__()
        self.hold(names, (inner,))
        self.out_features, self.in_features = slot_shape(self.slots[0])
        self.magnitude = as_parameter(torch.empty(self.out_features) if magnitude is None else magnitude)
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to what the inner map takes."""
        slot = self.slots[0]
        y = apply_slot(slot, x, None, context)
        factor = self._factor(slot_weight(slot).detach())
        return self.plus(y * self.along_features(factor), self.bias)

    def exact(self) -> Affine:
        """Return the weight with rows of the lengths `magnitude`, and the bias, in float64."""
        weight, _ = slot_exact(self.slots[0])
        return Affine(self._factor(weight).detach()[:, None] * weight, exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the weight with rows of the lengths `magnitude`."""
        weight = slot_weight(self.slots[0])
        return self._factor(weight.detach())[:, None] * weight

    def cost(self, tokens: int = 1) -> Cost:
        """Return what the inner map and the magnitudes cost; the rows' lengths are worked out once, not for every token."""
        size = self.magnitude.numel()
        return super().cost(tokens) + Cost(size, size * self.magnitude.element_size(), tokens * size)

    def _factor(self, weight: Tensor) -> Tensor:
        """Return magnitude / |row|, (out_features,); a row of zeros stays one."""
        norm: Tensor = weight.norm(dim=1)
        zero = norm == 0
        factor: Tensor = self.magnitude.to(weight.dtype) / norm.masked_fill(zero, 1.0)
        return factor.masked_fill(zero, 0.0)

    def __repr__(self) -> str:
        inner = self.slots[0]
        return (
            f"RowNorm({inner!r})" if isinstance(inner, LinearMap) else f"RowNorm(Dense[{self.out_features},{self.in_features}])"
        )
