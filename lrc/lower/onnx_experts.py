"""Experts in an ONNX file: rows sorted by expert are cut at the offsets, and each piece is multiplied with its own matrix.

grouped_mm(x, W, offs)  ->  Concat(MatMul(Slice(x, 0, offs[0]), W[0]), MatMul(Slice(x, offs[0], offs[1]), W[1]), …)

ONNX has no product in groups of rows, and torch's exporter no form of this operator. Where the pieces end is known at run time
alone, so an expert without rows costs nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lrc.kernels import grouped_linear

INT64 = 7  # of onnx.TensorProto


def expert_translations() -> Mapping[Any, Callable[..., Any]]:
    """Return how torch's exporter shall write the operators of experts that this process knows."""
    made: dict[Any, Callable[..., Any]] = {
        grouped_linear._opoverload: of_linear,
        torch.ops.aten._grouped_mm.default: product,
    }
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # registered by transformers
    return made if fallback is None else made | {fallback.default: product}


def of_linear(x: Any, weight: Any, offs: Any) -> Any:
    """Write `grouped_linear`; weight (experts, out_features, in_features)."""
    from onnxscript import opset18 as op

    return product(x, op.Transpose(weight, perm=[0, 2, 1]), offs, int(weight.shape[0]))


def product(x: Any, weight: Any, offs: Any, experts: int | None = None) -> Any:
    """Write a grouped product; weight (experts, in_features, out_features). The last offset is the number of rows."""
    from onnxscript import opset18 as op

    ends, start, pieces = op.Cast(offs, to=INT64), op.Constant(value_ints=[0]), []
    for expert in range(int(weight.shape[0]) if experts is None else experts):
        end = op.Slice(ends, op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1]))
        rows = op.Slice(x, start, end, op.Constant(value_ints=[0]))
        pieces.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=expert), axis=0)))
        start = end
    return op.Concat(*pieces, axis=0)
