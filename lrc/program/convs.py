"""Recognising the convolutions of an ATen graph, before and after decomposition."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import Geometry, Patches
from lrc.program.products import Product, stored

aten = torch.ops.aten
PLAIN = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
NAMED = {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}


def match_conv(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Return the convolution that `node` computes, or None: transposed ones are none, nor are "same" paddings of two kinds."""
    if node.target in PLAIN or node.target in NAMED:
        given = list(node.args) + [None] * (7 - len(node.args))
        x, weight, bias, stride, padding, dilation, groups = given
    elif node.target == aten.convolution.default:
        x, weight, bias, stride, padding, dilation, is_transposed, _, groups = node.args
        if is_transposed:
            return None
    else:
        return None
    source, added = stored(weight), None if bias is None else stored(bias)
    if source is None or source[1] or not isinstance(x, fx.Node) or (bias is not None and added is None):
        return None
    kernel = tuple(tensors[source[0]].shape[2:])
    geometry = geometry_of(kernel, stride, padding, dilation, groups)
    value = x.meta.get("val")
    if geometry is None or not isinstance(value, Tensor) or value.ndim != 2 + len(kernel):
        return None
    return Product(node, x, source[0], None if added is None else added[0], Patches(kernel, geometry))


def geometry_of(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: Any) -> Geometry | None:
    """Return the geometry that the arguments of a convolution say, or None where it pads one side more than the other."""
    dims = len(kernel)
    steps, spread = _each(stride, dims, 1), _each(dilation, dims, 1)
    if padding == "valid":
        around = (0,) * dims
    elif padding == "same":
        whole = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        if any(size % 2 for size in whole):
            return None
        around = tuple(size // 2 for size in whole)
    else:
        around = _each(padding, dims, 0)
    return Geometry(steps, around, spread, 1 if groups is None else int(groups))


def _each(value: Any, dims: int, default: int) -> tuple[int, ...]:
    """Return one number a dimension."""
    given = [default] if value is None else [value] if isinstance(value, int) else [int(v) for v in value]
    return tuple(given * dims if len(given) == 1 else given)
