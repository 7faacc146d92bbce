"""The stored tensors of a graph module, and the maps that hold them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from lrc.maps import LinearMap
from lrc.maps.recurrence import Recurrence


def stored_tensors(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the parameters and buffers of a graph module by name, each object once."""
    return dict(named_tensors(graph_module))


def named_tensors(graph_module: fx.GraphModule, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and then the buffers by name; without `remove_duplicate`, those with several names under each."""
    yield from graph_module.named_parameters(remove_duplicate=remove_duplicate)
    yield from graph_module.named_buffers(remove_duplicate=remove_duplicate)


def stored_size(graph_module: fx.GraphModule) -> tuple[int, int]:
    """Return the stored numbers, packed ones too, and all stored bytes."""
    modules = list(graph_module.modules())
    held = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    tensors = list({id(t): t for t in held}.values())
    numbers = sum(t.numel() for t in tensors if t.is_floating_point())
    numbers += sum(module.packed_numbers for module in modules if isinstance(module, LinearMap | Recurrence))
    return numbers, sum(t.nbytes for t in tensors)


def standing(graph_module: fx.GraphModule, name: str) -> LinearMap:
    """Return the map that stands at a name, also inside of a loop."""
    found: Any = graph_module.get_submodule(name)
    made: LinearMap = found.map if isinstance(found, Recurrence) else found
    return made
