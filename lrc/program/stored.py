"""The stored tensors of a graph module."""

from collections.abc import Iterator

from torch import Tensor, fx


def stored_tensors(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the parameters and buffers of a graph module by name, each object once."""
    return dict(named_tensors(graph_module))


def named_tensors(graph_module: fx.GraphModule, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and then the buffers by name; without `remove_duplicate`, those with several names under each."""
    yield from graph_module.named_parameters(remove_duplicate=remove_duplicate)
    yield from graph_module.named_buffers(remove_duplicate=remove_duplicate)
