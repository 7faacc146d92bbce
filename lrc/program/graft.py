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
    the program, so training one view trains the other; where the program is frozen but for adapters, so is the tree. `model`
    itself is not changed. `nn.MultiheadAttention`, `nn.LSTM` and the like, which call their weights by themselves, are
    replaced as a whole. A head that was tied to an embedding and got a map of its own is untied in the config. Raises
    LowerError for a site that has no module in `model`.
    """
    source = program.origin.model if model is None else model
    if source is None:
        raise LowerError(
            program.origin.name, message="there is no module to graft into", hint="Give the module, or use `.module`"
        )
    if program.inserted:
        name, reason = next(iter(program.inserted.items()))
        raise LowerError(name, message=reason, hint="Use `.module`, or export `format: onnx` or `pt2`")
    twin = share(source, frozen=program.frozen)
    for fqn, norm in program.modules.items():
        _put(twin, fqn, norm)
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
    for module in program.idle:
        twin.set_submodule(module, nn.Identity())
    forget_ties(twin)
    share_factors(twin, shared_factors(program))
    _put_changed(program, twin)
    set_attributes(twin, program.attributes)
    return twin


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Give modules the numbers that they must have where what they read has been cut."""
    for name, own in attributes.items():
        for attribute, value in own.items():
            setattr(model.get_submodule(name), attribute, value)


def shared_factors(program: Program) -> dict[str, str]:
    """Return the names of factors that maps of several sites share, each with the name under which it is stored."""
    first: dict[int, str] = {}
    found = joint_factors(program)
    for fqn in program.maps:
        for module, made in program.placed(fqn).items():
            for name, parameter in made.named_parameters():
                whole = f"{module}.{name}"
                owner, stored = fqn, first.setdefault(id(parameter), whole)
                if stored != whole and not any(stored.startswith(f"{use.module}.") for use in program.site(owner).uses):
                    found[whole] = stored
    return found


def share_factors(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Let one parameter stand at both names of every pair, and say so to transformers, which saves and loads it once."""
    for name, stored in shared.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter(stored))
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if shared and hasattr(model, attribute):
            setattr(model, attribute, {**(getattr(model, attribute) or {}), **shared})


def _put_changed(program: Program, model: nn.Module) -> None:
    """Give a tree the tensors outside of maps that passes gave other values, under every name that they have."""
    tensors = program.tensors()
    for name in sorted(program.changed & tensors.keys()):
        for alias in program.names.ties(name) or (name,):
            owner, _, last = alias.rpartition(".")
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                continue  # a map stands at this place now
            held = module._parameters if last in module._parameters else module._buffers
            if last in held:
                held[last] = tensors[name]  # type: ignore[assignment]  # a parameter among parameters


def share(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """Return a copy of a module tree whose parameters and buffers are those of the original.

    frozen: parameters share their memory with those of the original alone, and are not trained.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) if frozen else p for p in model.parameters()}
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


def joint_factors(program: Program) -> dict[str, str]:
    """Return the names of a head's factors, each with that of the same one in the table which the head shares."""
    found: dict[str, str] = {}
    for fqn in program.maps:
        placed, uses = program.placed(fqn), program.site(fqn).uses
        for table in [use.module for use in uses if use.layout is not None]:
            names = {id(p): f"{table}.{name}" for name, p in placed[table].named_parameters()}
            heads = [use.module for use in uses if use.layout is None]
            found |= {f"{h}.{name}": names[id(p)] for h in heads for name, p in placed[h].named_parameters() if id(p) in names}
    return found


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


def _put(model: nn.Module, fqn: str, made: nn.Module) -> None:
    try:
        place(model, fqn, made)
    except AttributeError as error:
        raise LowerError(
            fqn,
            message="the module to graft into has no submodule of this name",
            hint="Give the module that was captured",
        ) from error
