"""A product with a packed weight whose backward decodes the weight again: no dense weight is kept in between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F


@dataclass(frozen=True)
class Packed:
    """A weight (out_features, in_features) that is decoded where it is applied.

    decode: returns the weight, from its `values` where it has trained ones. gather: takes a gradient of the weight to one of
    the values; it is linear. product: returns weight x by a kernel that reads the packed weight; none: decode, then multiply.
    """

    decode: Callable[[Tensor | None], Tensor]
    gather: Callable[[Tensor], Tensor] | None = None
    product: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def applied(self, x: Tensor, bias: Tensor | None, values: Tensor | None) -> Tensor:
        """Return weight x + bias."""
        if self.product is None:
            return F.linear(x, self.decode(values), bias)
        y = self.product(x, values)
        return y if bias is None else y + bias


def packed_linear(x: Tensor, bias: Tensor | None, packed: Packed, values: Tensor | None = None) -> Tensor:
    """Return weight x + bias for x (..., in_features), bias (out_features,).

    The backward keeps x and the values, where they are needed, and decodes again. A compiler or exporter sees the plain
    operations: it decides itself what is kept.
    """
    if isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return packed.applied(x, bias, values)
    y: Tensor = PackedLinear.apply(x, bias, values, packed)  # type: ignore[no-untyped-call]
    return y


class PackedLinear(torch.autograd.Function):
    """The product, and its gradients with respect to x, bias and values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, values: Tensor | None, packed: Packed) -> Tensor:
        """Multiply."""
        return packed.applied(x, bias, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x where the values are trained, and no weight."""
        x, _, values, ctx.packed = inputs
        ctx.features = x.shape[-1]
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Decode again; autograd can go through this once more."""
        (dy,) = gradients
        x, values = ctx.saved_tensors
        need_x, need_bias, need_values = ctx.needs_input_grad[:3]
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ ctx.packed.decode(values).to(dy.dtype) if need_x else None
        dbias = rows.sum(0) if need_bias else None
        dvalues = ctx.packed.gather(rows.T @ x.reshape(-1, ctx.features).to(dy.dtype)) if need_values else None
        return dx, dbias, dvalues, None
