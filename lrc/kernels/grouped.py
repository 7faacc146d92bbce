"""The operator `lrc::grouped_linear`: rows sorted by expert, every one through the matrix of its own expert.

It is what `transformers::grouped_mm_fallback` computes, for weights as `nn.Linear` keeps them and of any sizes (torch's own
`grouped_mm` wants strides of whole 16 bytes, which ranks seldom have). Exporters see one operator, since how many rows an
expert gets is known only at run time.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lrc::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Return weight[e] x of every row, (rows, out_features), with e the expert of the row; 0 for rows after the last offset.

    x: (rows, in_features), weight: (experts, out_features, in_features), offs: (experts,), integers, where the rows of each
    expert end. One copy of `offs` to the host, none where nothing is on a device.
    """
    y = x.new_zeros(len(x), weight.shape[1])
    for matrix, rows in zip(weight, _rows(offs), strict=True):
        if rows.stop > rows.start:
            torch.mm(x[rows], matrix.T, out=y[rows])
    return y


@torch.library.custom_op("lrc::grouped_outer", mutates_args=())
def grouped_outer(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """Return the sum of dy xᵀ over the rows of every expert, (experts, out_features, in_features): the weight's gradient."""
    made = x.new_zeros(len(offs), dy.shape[1], x.shape[1])
    for matrix, rows in zip(made, _rows(offs), strict=True):
        if rows.stop > rows.start:
            torch.mm(dy[rows].T, x[rows], out=matrix)
    return made


def _rows(offs: Tensor) -> list[slice]:
    ends = offs.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@grouped_linear.register_fake
def _linear_shape(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _outer_shape(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], dy.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offs = ctx.saved_tensors
    dx = grouped_linear(dy, weight.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    dW = grouped_outer(dy, x, offs) if ctx.needs_input_grad[1] else None
    return dx, dW, None


grouped_linear.register_autograd(_backward, setup_context=_keep)
