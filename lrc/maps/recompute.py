"""A product with a packed weight whose backward decodes the weight again: no dense weight is kept in between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F


@dataclass(frozen=True)
class Packed:
    """A weight (out_features, in_features) that is decoded where it is applied.

    stored: packed tensors. decode: returns the weight of trained values, where it has some, and of packed tensors. gather:
    takes a gradient of the weight to one of the values; it is linear. product: returns weight x by a kernel that reads the
    packed weight; none: decode, then multiply.
    """

    stored: Sequence[Tensor]
    decode: Callable[[Tensor | None, Sequence[Tensor]], Tensor]
    gather: Callable[[Tensor, Sequence[Tensor]], Tensor] | None = None
    product: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def applied(self, x: Tensor, bias: Tensor | None, values: Tensor | None) -> Tensor:
        """Return weight x + bias."""
        if self.product is None:
            return F.linear(x, self.decode(values, self.stored), bias)
        y = self.product(x, values)
        return y if bias is None else y + bias


def packed_linear(x: Tensor, bias: Tensor | None, packed: Packed, values: Tensor | None = None) -> Tensor:
    """Return weight x + bias for x (..., in_features), bias (out_features,).

    The backward keeps x and the values, where they are needed, and decodes again, also where torch.compile traces both. An
    exporter, and a compiler under autocast, sees the plain operations.
    """
    if compiled_for_training(x, values):
        product: Tensor = DecodedAgain.apply(x, values, packed.decode, packed.gather, *packed.stored)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias
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
        dx = dy @ ctx.packed.decode(values, ctx.packed.stored).to(dy.dtype) if need_x else None
        dbias = rows.sum(0) if need_bias else None
        dvalues = None
        if need_values:
            dvalues = ctx.packed.gather(rows.T @ x.reshape(-1, ctx.features).to(dy.dtype), ctx.packed.stored)
        return dx, dbias, dvalues, None


def compiled_for_training(x: Tensor, values: Tensor | None) -> bool:
    """Say whether torch.compile traces a product whose gradients will be asked for."""
    if isinstance(x, fx.Proxy) or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    trained = x.requires_grad or (values is not None and values.requires_grad)
    return torch.is_grad_enabled() and trained and not torch.is_autocast_enabled(x.device.type)


@torch.library.custom_op("lrc::in_backward", mutates_args=())
def in_backward(packed: Tensor, gradient: Tensor) -> Tensor:
    """Return a copy of packed numbers that needs a gradient to be made.

    A compiler that plans forward and backward together keeps what both need. What is decoded from this copy depends on the
    gradient, so it can only be made in the backward; the forward hands over the packed numbers alone.
    """
    return packed.clone()


@in_backward.register_fake
def _(packed: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(packed)


class DecodedAgain(torch.autograd.Function):
    """weight x, as compilers trace it: decoded in the forward, and anew in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor | None, decode: Any, gather: Any, *stored: Tensor) -> Tensor:
        """Multiply. decode, gather, stored: of `Packed`."""
        ctx.decode, ctx.gather = decode, gather
        ctx.save_for_backward(x, values, *stored)
        return F.linear(x, decode(values, stored))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Decode copies that are made now."""
        (dy,) = gradients
        x, values, *stored = ctx.saved_tensors
        copies = [in_backward(tensor, dy) for tensor in stored]
        dx = dy @ ctx.decode(values, copies).to(dy.dtype) if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[1]:
            rows = dy.reshape(-1, dy.shape[-1])
            dvalues = ctx.gather(rows.T @ x.reshape(-1, x.shape[-1]).to(dy.dtype), copies)
        return dx, dvalues, None, None, *[None for _ in stored]
