"""The second view of a program's parameters: the same maps inside the user's own module tree."""

import copy
from typing import Any

from torch import nn

from lrc.errors import LowerError
from lrc.maps import LinearMap
from lrc.program.program import Program


def graft(program: Program, model: nn.Module | None = None) -> nn.Module:
    """Return a module tree like `model`'s with the program's maps at their places.

    The tree is new, its tensors are not: everything that no pass touched is shared with `model`, and the maps are those of
    the program, so training one view trains the other. `model` itself is not changed. A head that was tied to an embedding
    and got a map of its own is untied in the config. Raises LowerError for a site that has no module in `model`.
    """
    source = program.origin.model if model is None else model
    if source is None:
        raise LowerError(
            program.origin.name, message="there is no module to graft into", hint="Give the module, or use `.module`"
        )
    twin = share(source)
    for fqn in program.maps:
        site = program.site(fqn)
        if not site.has_module:
            raise LowerError(
                fqn,
                message="the weight is a parameter of a larger module, which calls it by itself",
                hint="Name it under `ignore`, or use `.module` in place of `.graft`",
            )
        for module, made in program.placed(fqn).items():
            _put(twin, module, made)
        if site.tied:
            untie(twin)
    return twin


def share(model: nn.Module) -> nn.Module:
    """Return a copy of a module tree whose parameters and buffers are those of the original."""
    memo: dict[int, Any] = {id(t): t for t in model.parameters()}
    memo |= {id(t): t for t in model.buffers()}
    return copy.deepcopy(model, memo)


def untie(model: nn.Module) -> None:
    """Say in a transformers config that the head no longer shares the embedding."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False


def _put(model: nn.Module, fqn: str, made: LinearMap) -> None:
    try:
        old = model.get_submodule(fqn)
    except AttributeError as error:
        raise LowerError(
            fqn,
            message="the module to graft into has no submodule of this name",
            hint="Give the module that was captured",
        ) from error
    made.train(old.training)
    model.set_submodule(fqn, made)
