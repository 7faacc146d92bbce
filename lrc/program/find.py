"""Every product of an ATen graph with a stored tensor, and what else reads such tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lrc.maps import Rows
from lrc.program.bags import match_bag
from lrc.program.convs import match_conv
from lrc.program.experts import match_experts
from lrc.program.linears import match_linear
from lrc.program.lookups import match_lookup
from lrc.program.products import FLIPS, PASSES, Product, stored
from lrc.program.recurrences import nodes_inside

MATCHERS = (match_linear, match_conv, match_lookup, match_bag, match_experts)


def find_products(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> list[Product]:
    """Return every product of the graph, in order. tensors: the stored tensors by name.

    A tensor that acts in several ways (a head that shares the embedding) is found in the first of them alone, in the order
    of `MATCHERS`; the others are consumers.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    found: dict[fx.Node, Product] = {}
    taken: dict[str, Any] = {}
    for match in MATCHERS:
        for node in nodes:
            product = match(node, tensors)
            if product is not None and taken.setdefault(product.weight, product.layout).kind == product.layout.kind:
                found[node] = product
    return [found[node] for node in nodes if node in found]


def shared_lookups(graph: fx.Graph, products: Sequence[Product], tensors: Mapping[str, Tensor]) -> dict[str, list[Product]]:
    """Return the embeddings that look up in the weight of a linear, by its name."""
    linears = {product.weight for product in products if product.layout == Rows()}
    found: dict[str, list[Product]] = {}
    for node in graph.nodes:
        product = match_lookup(node, tensors) if node.op == "call_function" else None
        if product is not None and product.weight in linears:
            found.setdefault(product.weight, []).append(product)
    return found


def consumers(
    graph: fx.Graph, products: Sequence[Product], tensors: Mapping[str, Tensor], recurrent: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Return, for every stored matrix, the other operations that read it, by their plain names.

    recurrent: the nodes of recurrent operators whose weights are sites.
    """
    ours = inside(products) | nodes_inside(graph, recurrent)
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in ours or node.target in FLIPS | PASSES:
            continue
        for read in node.all_input_nodes:
            source = stored(read)
            if source is not None and tensors[source[0]].ndim >= 2:
                found.setdefault(source[0], []).append(plain_name(node.target))
    return found


def inside(products: Iterable[Product]) -> set[fx.Node]:
    """Return the nodes that products are made of, from what they read (excluded) to what they give."""
    found: set[fx.Node] = set()
    for product in products:
        waiting = [product.node]
        while waiting:
            node = waiting.pop()
            if node not in found and node is not product.reads and node not in product.context.values():
                found.add(node)
                waiting += node.all_input_nodes
    return found


def plain_name(target: Any) -> str:
    """Return `embedding` for `aten.embedding.default`."""
    name = target.__name__ if hasattr(target, "__name__") else str(target)
    return str(name).split(".", 1)[0].strip("_")
