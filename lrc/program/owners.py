"""Putting a map into a module tree: in place of a module, or into one that calls its weights by itself."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lrc.maps import Experts, LinearMap
from lrc.program.attention import MappedAttention
from lrc.program.recurrent_modules import MappedGRU, MappedLSTM, MappedRNN

OWNERS: Mapping[type[nn.Module], Callable[[Any], Any]] = {
    nn.MultiheadAttention: MappedAttention.of, nn.LSTM: MappedLSTM.of, nn.GRU: MappedGRU.of, nn.RNN: MappedRNN.of,
}  # fmt: skip
GEOMETRY = ("kernel_size", "stride", "padding", "dilation")
MAPPED = (MappedAttention, MappedLSTM, MappedGRU, MappedRNN)


def owned(model: nn.Module, fqn: str) -> bool:
    """Say whether the module above a name is one that is replaced as a whole."""
    owner, _, name = fqn.rpartition(".")
    try:
        parent = model.get_submodule(owner)
    except AttributeError:
        return False
    if _is_bank(parent, name):
        return True
    return bool(owner) and (type(parent) in OWNERS or isinstance(parent, MAPPED))


def place(model: nn.Module, fqn: str, made: nn.Module) -> None:
    """Put a map or a norm at a name: in place of the module there, or of the weight of that name in a module of several.

    Such a module (`nn.MultiheadAttention`, `nn.LSTM`) is replaced by one that calls maps. Raises AttributeError where there is
    neither.
    """
    owner, _, name = fqn.rpartition(".")
    if not owned(model, fqn):
        replaced = model.get_submodule(fqn)
        made.train(replaced.training)
        _tell_geometry(made, replaced)
        model.set_submodule(fqn, made)
        return
    parent: Any = model.get_submodule(owner)
    if isinstance(made, Experts):
        parent._parameters.pop(name, None)
        parent.add_module(name, made.train(parent.training))
        return
    if not isinstance(parent, MAPPED):
        parent = OWNERS[type(parent)](parent)
        model.set_submodule(owner, parent)
    assert isinstance(made, LinearMap), "a weight's place takes a map"
    made.train(parent.training)
    parent.put(name, made)


def _tell_geometry(made: nn.Module, replaced: nn.Module) -> None:
    """Let a map tell what code that pads by itself (MobileNet) reads of the convolution in whose place it is."""
    for name in GEOMETRY if isinstance(replaced, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ():
        if not hasattr(made, name):
            setattr(made, name, getattr(replaced, name))


def _is_bank(parent: nn.Module, name: str) -> bool:
    """Say whether a module holds matrices of experts under a name, as a tensor or as a map."""
    held: Any = parent._parameters.get(name)
    return isinstance(parent._modules.get(name), Experts) or (held is not None and held.ndim == 3)
