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

    decode: returns the weight, from its `values` where it has trained ones. gather: takes a gradient of the weight to one of
    the values; it is linear. product: returns weight x by a kernel that reads the packed weight; none: decode, then multiply.
    stored, decode_stored: the packed tensors, and the weight as a function of them, for a weight without trained values; only a
    compiler asks for them.
    """

    decode: Callable[[Tensor | None], Tensor]
    gather: Callable[[Tensor], Tensor] | None = None
    product: Callable[[Tensor, Tensor | None], Tensor] | None = None
    stored: Sequence[Tensor] = ()
    decode_stored: Callable[[Sequence[Tensor]], Tensor] | None = None

    def applied(self, x: Tensor, bias: Tensor | None, values: Tensor | None) -> Tensor:
        """Return weight x + bias."""
        if self.product is None:
            return F.linear(x, self.decode(values), bias)
        y = self.product(x, values)
        return y if bias is None else y + bias


def packed_linear(x: Tensor, bias: Tensor | None, packed: Packed, values: Tensor | None = None) -> Tensor:
    """Return weight x + bias for x (..., in_features), bias (out_features,).

    The backward keeps x and the values, where they are needed, and decodes again. An exporter sees the plain operations, and
    so does a compiler, which decides itself what is kept; but what it is told how to decode (`stored`) it decodes again too.
    """
    if compiled_for_training(x) and packed.decode_stored is not None:
        product: Tensor = DecodedAgain.apply(x, packed.decode_stored, *packed.stored)  # type: ignore[no-untyped-call]
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
        dx = dy @ ctx.packed.decode(values).to(dy.dtype) if need_x else None
        dbias = rows.sum(0) if need_bias else None
        dvalues = ctx.packed.gather(rows.T @ x.reshape(-1, ctx.features).to(dy.dtype)) if need_values else None
        return dx, dbias, dvalues, None


def compiled_for_training(x: Tensor) -> bool:
    """Say whether torch.compile traces a product whose gradient with respect to x will be asked for."""
    if isinstance(x, fx.Proxy) or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return torch.is_grad_enabled() and x.requires_grad and not torch.is_autocast_enabled(x.device.type)


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
    """weight x for a frozen packed weight, as compilers trace it: decoded in the forward, and anew in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[[Sequence[Tensor]], Tensor], *stored: Tensor) -> Tensor:
        """Multiply."""
        ctx.decode = decode
        ctx.save_for_backward(*stored)
        return F.linear(x, decode(stored))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Decode copies that are made now."""
        (dy,) = gradients
        weight = ctx.decode([in_backward(tensor, dy) for tensor in ctx.saved_tensors])
        return dy @ weight.to(dy.dtype), None, *[None for _ in ctx.saved_tensors]
