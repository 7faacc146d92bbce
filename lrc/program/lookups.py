"""Recognising the embeddings of an ATen graph."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from lrc.maps import Indices
from lrc.program.products import Product, stored

aten = torch.ops.aten


def match_lookup(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Return the embedding that `node` computes, or None."""
    if node.target != aten.embedding.default:
        return None
    source, ids = stored(node.args[0]), node.args[1]
    if source is None or source[1] or tensors[source[0]].ndim != 2 or not isinstance(ids, fx.Node) or stored(ids) is not None:
        return None
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
    padding = given if isinstance(given, int) and given >= 0 else None
    return Product(node, ids, source[0], None, Indices(padding))
