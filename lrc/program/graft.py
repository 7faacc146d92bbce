"""The second view of a program's parameters: the same maps inside the user's own module tree."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lrc.errors import LowerError
from lrc.maps import LinearMap
from lrc.program.owners import owned, place
from lrc.program.program import Program


def graft(program: Program, model: nn.Module | None = None) -> nn.Module:
    """Return a module tree like `model`'s with the program's maps at their places.

    The tree is new, its tensors are not: everything that no pass touched is shared with `model`, and the maps are those of
    the program, so training one view trains the other. `model` itself is not changed. `nn.MultiheadAttention`, which calls
    its weights by itself, is replaced as a whole. A head that was tied to an embedding and got a map of its own is untied in
    the config. Raises LowerError for a site that has no module in `model`.
    """
    source = program.origin.model if model is None else model
    if source is None:
        raise LowerError(
            program.origin.name, message="there is no module to graft into", hint="Give the module, or use `.module`"
        )
    twin = share(source)
    for fqn in program.maps:
        site = program.site(fqn)
        if not site.has_module and not all(owned(twin, use.module) for use in site.uses):
            raise LowerError(
                fqn,
                message="the weight is a parameter of a larger module, which calls it by itself",
                hint="Name it under `ignore`, or use `.module` in place of `.graft`",
            )
        for module, made in program.placed(fqn).items():
            _put(twin, module, made)
        if site.tied:
            untie(twin)
    forget_ties(twin)
    for head, table in joint_modules(program):
        tie_maps(twin, head, table)
    return twin


def share(model: nn.Module) -> nn.Module:
    """Return a copy of a module tree whose parameters and buffers are those of the original."""
    memo: dict[int, Any] = {id(t): t for t in model.parameters()}
    memo |= {id(t): t for t in model.buffers()}
    return copy.deepcopy(model, memo)


def untie(model: nn.Module) -> None:
    """Say in a transformers config that the head no longer shares the embedding, where such a config can say so.

    T5's cannot: read again, it would tie them all the same, and no longer scale what the head reads.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "tie_word_embeddings"):
        before, config.tie_word_embeddings = config.tie_word_embeddings, False
        if type(config).from_dict(config.to_dict()).tie_word_embeddings is not False:
            config.tie_word_embeddings = before


def joint_modules(program: Program) -> list[tuple[str, str]]:
    """Return the names of a head and of an embedding for all that one map stands for."""
    sites = [program.site(fqn) for fqn in program.maps]
    return [(site.uses[0].module, use.module) for site in sites for use in site.uses if use.layout is not None]


def tie_maps(model: nn.Module, head: str, table: str) -> None:
    """Make the matrices of a head those of a table, and tell transformers, which stores them once under the table's names."""
    target, source = model.get_submodule(head), model.get_submodule(table)
    names = {}
    for name, parameter in source.named_parameters(recurse=False):
        own = "weight" if name == "table" else name  # of a dense head
        setattr(target, own, parameter)
        names[f"{head}.{own}"] = f"{table}.{name}"
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if hasattr(model, attribute):
            setattr(model, attribute, dict(getattr(model, attribute) or {}) | names)


def forget_ties(model: nn.Module) -> None:
    """Let transformers forget the ties of weights whose place a map has taken."""
    for part in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(part, attribute, None)
            if isinstance(ties, Mapping):
                setattr(part, attribute, {name: tie for name, tie in ties.items() if not _is_replaced(part, name)})


def _is_replaced(model: nn.Module, name: str) -> bool:
    """Say whether a name is that of a tensor which a map stands for and does not hold."""
    owner, _, last = name.rpartition(".")
    try:
        made = model.get_submodule(owner)
    except AttributeError:  # a pattern, which names no module
        return False
    return isinstance(made, LinearMap) and last not in made._parameters


def _put(model: nn.Module, fqn: str, made: LinearMap) -> None:
    try:
        place(model, fqn, made)
    except AttributeError as error:
        raise LowerError(
            fqn,
            message="the module to graft into has no submodule of this name",
            hint="Give the module that was captured",
        ) from error
