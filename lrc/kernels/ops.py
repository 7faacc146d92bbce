"""The operators of torch, `lrc::two_factor_linear` and `lrc::quantized_linear`: a kernel on GPUs, the reference elsewhere.

Compilers trace through both: Inductor sees plain ATen for a CPU, and a Triton kernel that it can schedule for a GPU.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.formats import Encoded, NumberFormat, format_of

HAS_TRITON = find_spec("triton") is not None


def operator(name: str) -> Callable[[Any], Any]:
    """Make a function an operator that compilers know by its name; without triton it stays a function, its reference."""
    return torch.library.triton_op(name, mutates_args={}) if HAS_TRITON else lambda function: function


@operator("lrc::two_factor_linear")
def two_factor_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return B (A x) + bias for x (..., in_features), A (rank, in_features), B (out_features, rank). It has no gradient."""
    if not x.is_cuda:
        return F.linear(F.linear(x, A), B, bias)
    from lrc.kernels import triton_two_factor as kernels

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(rows.shape[0], B.shape[0])
    given, constants = kernels.arguments(rows, A.contiguous(), B.contiguous(), bias, y)
    kernel = torch.library.wrap_triton(kernels.TUNED[A.shape[0] > 128])
    splits = max(1, min(-(-B.shape[0] // 128), 8))  # more programs than rows alone give
    kernel[lambda meta: (-(-rows.shape[0] // meta["BM"]), splits)](*given, **constants)
    return y.reshape(*x.shape[:-1], B.shape[0])


def quantized_linear(
    x: Tensor, encoded: Encoded, form: NumberFormat, out_features: int, A: Tensor | None = None, B: Tensor | None = None
) -> Tensor:
    """Return W x + B (A x) for x (..., in_features), W (out_features, in_features) packed in a format."""
    packed, settings = list(encoded.values()), form.model_dump_json()
    y: Tensor = packed_linear(x, packed, ",".join(encoded), settings, out_features, A, B)
    return y


@operator("lrc::quantized_linear")
def packed_linear(
    x: Tensor, packed: list[Tensor], names: str, form: str, out_features: int, A: Tensor | None, B: Tensor | None
) -> Tensor:
    """Return W x + B (A x); names: of the packed tensors, with commas; form: the number format's settings as JSON."""
    encoded, settings = dict(zip(names.split(","), packed, strict=True)), form_of(form)
    if not x.is_cuda:
        y = F.linear(x, settings.decode(encoded, (out_features, x.shape[-1])).to(x.dtype))
        return y if A is None or B is None else y + F.linear(F.linear(x, A), B)
    from lrc.kernels import triton_quantized as kernels

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(rows.shape[0], out_features)
    given, constants = kernels.arguments(rows, encoded, settings, A, B, None, y)
    kernel = torch.library.wrap_triton(kernels.TUNED)
    kernel[lambda meta: (-(-rows.shape[0] // meta["BM"]), -(-out_features // meta["BN"]))](*given, **constants)
    return y.reshape(*x.shape[:-1], out_features)


def form_of(text: str) -> NumberFormat:
    """Return a format from its settings as JSON."""
    import json

    return format_of(json.loads(text))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, ctx.names, ctx.form, ctx.out_features, A, B = inputs
    ctx.save_for_backward(x if A is not None else None, A, B, *packed)
    ctx.in_features = x.shape[-1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Decode the weight again; the gradients of the factors are those of two products after each other."""
    x, A, B, *packed = ctx.saved_tensors
    encoded = dict(zip(ctx.names.split(","), packed, strict=True))
    dx = dy @ form_of(ctx.form).decode(encoded, (ctx.out_features, ctx.in_features)).to(dy.dtype)
    none = [None] * len(packed)
    if A is None:
        return dx, none, None, None, None, None, None
    inner = dy @ B
    rows, inner_rows = x.reshape(-1, ctx.in_features), inner.reshape(-1, A.shape[0])
    dB = dy.reshape(-1, ctx.out_features).T @ (rows @ A.T)
    return dx + inner @ A, none, None, None, None, inner_rows.T @ rows, dB


if HAS_TRITON:
    packed_linear.register_autograd(_backward, setup_context=_keep)
