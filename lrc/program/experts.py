"""Recognising products with the matrices of all experts, or of those that rows are sent to, in an ATen graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import Banks
from lrc.program.products import Product, stored

aten = torch.ops.aten
PRODUCTS = {aten.bmm.default, aten.matmul.default}
GROUPED = {  # whether the matrices are (in_features, out_features)
    "transformers.grouped_mm_fallback.default": True,
    "aten._grouped_mm.default": True,
    "lrc.grouped_linear.default": False,
}
TURNS = ((1, 2), (2, 1), (-1, -2), (-2, -1))


def match_experts(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Return the product with a stored tensor (experts, …, …) that `node` gives, or None.

    bmm(x, weight), all experts at once; squeeze(bmm(weight[ids], unsqueeze(x))), a row for each of `ids`; or
    grouped_mm(x, weight, offs), rows sorted by their experts.
    """
    if str(node.target) in GROUPED:
        return _grouped(node, tensors)
    if node.target in PRODUCTS:
        x: Any = node.args[0]
        weight: Any = node.args[1]
        source = _stored(weight, tensors)
        if source is None or not _is_value(x, 3):
            return None
        name, turned = source
        layout = Banks(transposed=not turned, experts=len(tensors[name]))
        return Product(node, x, name, None, layout)
    return _selected(node, tensors) if node.target == aten.squeeze.dim else None


def _grouped(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    x, weight, *rest = node.args
    given = [*rest, *(value for value in node.kwargs.values() if value is not None)]
    source = _stored(weight, tensors)
    if source is None or not _is_value(x, 2) or len(given) != 1 or not _is_value(given[0], 1):
        return None
    name, turned = source
    assert isinstance(x, fx.Node)
    assert isinstance(given[0], fx.Node)
    layout = Banks(transposed=turned != GROUPED[str(node.target)], experts=len(tensors[name]))
    return Product(node, x, name, None, layout, {"offs": given[0]})


def _selected(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    product: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else None
    if not isinstance(product, fx.Node) or product.target != aten.bmm.default or len(product.users) > 1:
        return None
    left: Any = product.args[0]
    right: Any = product.args[1]
    row = 1 if _is_call(left, aten.unsqueeze.default) else 2  # rows from the left, or columns from the right
    read, chosen = (left, right) if row == 1 else (right, left)
    if not _is_call(read, aten.unsqueeze.default) or not _is_call(chosen, aten.index.Tensor):
        return None
    x, ids = read.args[0], chosen.args[1]
    source = _stored(chosen.args[0], tensors)
    if source is None or not _is_value(x, 2) or len(ids) != 1 or not _is_value(ids[0], 1):
        return None
    if read.args[1] % 3 != row or not isinstance(dim, int) or dim % 3 != row or ids[0].meta["val"].dtype != torch.int64:
        return None
    name, turned = source
    layout = Banks(transposed=turned == (row == 2), experts=len(tensors[name]))
    return Product(node, x, name, None, layout, {"ids": ids[0]})


def _stored(weight: Any, tensors: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """Return the name of a stored tensor of three dimensions, and whether its matrices are read transposed."""
    source = stored(weight)
    if source is None or tensors[source[0]].ndim != 3 or source[1] > 1:
        return None
    if source[1] and (weight.target != aten.transpose.int or tuple(weight.args[1:]) not in TURNS):
        return None
    return source[0], bool(source[1])


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target == target


def _is_value(node: Any, ndim: int) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) and stored(node) is None else None
    return isinstance(value, Tensor) and value.ndim == ndim
