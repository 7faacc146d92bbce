"""Putting a map into a module tree: in place of a module, or into one that calls its weights by itself."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lrc.maps import LinearMap
from lrc.program.attention import MappedAttention

OWNERS: Mapping[type[nn.Module], Callable[[Any], Any]] = {nn.MultiheadAttention: MappedAttention.of}
MAPPED = (MappedAttention,)


def owned(model: nn.Module, fqn: str) -> bool:
    """Say whether the module above a name is one that is replaced as a whole."""
    owner = fqn.rpartition(".")[0]
    try:
        parent = model.get_submodule(owner)
    except AttributeError:
        return False
    return bool(owner) and (type(parent) in OWNERS or isinstance(parent, MAPPED))


def place(model: nn.Module, fqn: str, made: nn.Module) -> None:
    """Put a map at a name: in place of the module there, or of the weight of that name in a module that owns several.

    Such a module (`nn.MultiheadAttention`) is replaced by one that calls maps. Raises AttributeError where there is neither.
    """
    owner, _, name = fqn.rpartition(".")
    if not owned(model, fqn):
        made.train(model.get_submodule(fqn).training)
        model.set_submodule(fqn, made)
        return
    parent: Any = model.get_submodule(owner)
    if not isinstance(parent, MAPPED):
        parent = OWNERS[type(parent)](parent)
        model.set_submodule(owner, parent)
    assert isinstance(made, LinearMap), "only maps stand for the weights of such a module"
    made.train(parent.training)
    parent.put(name, made)
