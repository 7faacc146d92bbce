"""A low-rank product plus a sparse rest, trained without keeping the dense weight that they make up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lrc.maps.composites import Chain, Scale, Sum
from lrc.maps.sparse import Sparse


@dataclass(frozen=True)
class Places:
    """Where the numbers of a sparse weight stand.

    spread: values to the weight (out_features, in_features), a new tensor; gather: its transpose, a gradient of the weight to
    that of the values.
    """

    spread: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


class SparseLowRankLinear(torch.autograd.Function):
    """y = x W' + bias with W = scale B A + S, whose backward makes W again and keeps x and the parts alone.

    With g = dL/dy of shape (rows, out_features): dx = g W; M = g' x, which lives until the gradients of the parts are read off
    it: dB = scale M A', dA = scale B' M, dscale = <B' M, A>, dvalues = M on the support; dbias = sum of the rows of g.
    Source: Han et al. (2024), arXiv:2406.02214, algorithm 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, values: Tensor, scale: Tensor | float, places: Places
    ) -> Tensor:
        """Apply to x (..., in_features): B (out_features, rank), A (rank, in_features), values of S; scale: a number."""
        ctx.places, ctx.scale = places, None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(x, B, A, values, *([scale] if isinstance(scale, Tensor) else []))
        return F.linear(x, weight_of(B, A, values, scale, places), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what needs one."""
        x, B, A, values, *own = ctx.saved_tensors
        scale = own[0] if own else ctx.scale
        for_x, for_bias, for_B, for_A, for_values, for_scale, _ = ctx.needs_input_grad
        (g,) = gradients
        rows = g.reshape(-1, g.shape[-1])
        dx = (rows @ weight_of(B, A, values, scale, ctx.places).to(g.dtype)).view(x.shape).to(x.dtype) if for_x else None
        dbias = rows.sum(0) if for_bias else None
        dB = dA = dvalues = dscale = None
        if for_B or for_A or for_values or for_scale:
            M = (rows.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(B.dtype)
            dB = scale * (M @ A.T) if for_B else None
            BM = B.T @ M if for_A or for_scale else None
            dA = scale * BM if BM is not None and for_A else None
            dscale = (BM * A).sum().view_as(scale) if BM is not None and for_scale else None
            dvalues = ctx.places.gather(M).to(values.dtype) if for_values else None
        return dx, dbias, dB, dA, dvalues, dscale, None


def weight_of(B: Tensor, A: Tensor, values: Tensor, scale: Tensor | float, places: Places) -> Tensor:
    """Return scale B A + S."""
    spread = places.spread(values)
    if isinstance(scale, Tensor):
        return spread + scale * (B @ A)
    return spread.addmm_(B, A, alpha=scale)


class SparseLowRank(Sum):
    """The sum of a product of two matrices, with a constant in front or none, and a `Sparse` map.

    While it is trained it is applied as one weight, which is made anew in the backward pass: beside the output a layer keeps
    its input alone. Elsewhere, and for whatever else has come to stand in its slots, it is the plain sum.
    """

    word: ClassVar[str] = "sparse_low_rank"

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        plain = isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.training
        parts = None if plain else self.parts()
        if parts is None:
            return super().forward(x, **context)
        B, A, scale, rest = parts
        places = Places(rest.spread, rest.gathered)
        y: Tensor = SparseLowRankLinear.apply(x, self.bias, B, A, rest.values, scale, places)  # type: ignore[no-untyped-call]
        return y

    def parts(self) -> tuple[Tensor, Tensor, float, Sparse] | None:
        """Return B, A, the constant in front of them, and the sparse map; None where other maps stand in the slots."""
        product, rest = self.slots if len(self.slots) == 2 else (None, None)
        scale = 1.0
        if isinstance(product, Scale) and product.bias is None:
            scale, product = product.scale, product.slots[0]
        if not isinstance(product, Chain) or not isinstance(rest, Sparse) or rest.bias is not None or product.bias is not None:
            return None
        match product.slots:
            case (nn.Parameter() as B, nn.Parameter() as A):
                return B, A, scale, rest
        return None
