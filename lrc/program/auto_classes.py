"""Our folders in transformers' auto classes.

A folder of ours has `model_type: lrc_<base>` and a section `lrc` that says which map stands at which site. Without this
import, transformers refuses the folder ("does not recognize this architecture"). A missing factor is an error here, where a
stock model would silently go on with random numbers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrc.errors import ModelError
from lrc.maps import restore_module
from lrc.program.checks import check_finite, need_transformers
from lrc.program.graft import forget_ties, set_attributes, share_factors
from lrc.program.owners import owned, place

PREFIX = "lrc_"
FORMAT = 1

transformers = need_transformers()
_auto = transformers.models.auto
_configs: dict[str, Any] = {}


class _Configs(dict[str, Any]):
    """The extra entries of transformers' mapping of model types, to which ours are added when they are asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and _base_of(key) is not None)

    def __missing__(self, key: str) -> Any:
        return config_class(key)


def _base_of(model_type: str) -> str | None:
    base = model_type.removeprefix(PREFIX)
    return base if base != model_type and base in _auto.configuration_auto.CONFIG_MAPPING_NAMES else None


def config_class(model_type: str) -> Any:
    """Return the config class of `lrc_<base>`, and register it with every auto class that knows the base."""
    if model_type not in _configs:
        base_name = _base_of(model_type)
        if base_name is None:
            raise KeyError(model_type)
        base = _auto.configuration_auto.CONFIG_MAPPING[base_name]
        made = type(f"Lrc{base.__name__}", (base,), {"model_type": model_type, "__module__": __name__})
        _configs[model_type] = made
        for name in dir(_auto.modeling_auto):
            auto: Any = getattr(_auto.modeling_auto, name)
            mapping = getattr(auto, "_model_mapping", None)
            if hasattr(auto, "from_config") and mapping is not None and base in mapping:
                found = mapping[base]
                for model in found if isinstance(found, tuple) else (found,):
                    auto.register(made, model_class(model, made), exist_ok=True)
    return _configs[model_type]


def model_class(base: Any, config: Any) -> Any:
    """Return the class of a transformers model with our maps at the sites that its config names."""
    names = {"config_class": config, "__module__": __name__}
    return type(f"Lrc{base.__name__}", (_Mapped, base), names)


class _Mapped:
    """What our classes add to a transformers model: the maps, and the refusal of folders that lack a number of them."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the model class beside this one
        install(self, config.lrc)  # type: ignore[arg-type]
        forget_ties(self)  # type: ignore[arg-type]
        share_factors(self, placed_names(self, config.lrc.get("shared", {})))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a folder. Raises ModelError when a tensor is missing, or a number is not finite."""
        model, found = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(found["missing_keys"])
        if missing:
            raise ModelError(
                str(folder),
                message=f"the weights lack {len(missing)} tensors, first {missing[0]!r}",
                hint="Copy the whole folder again",
            )
        if not any(p.is_meta for p in model.parameters()):
            check_finite(model, str(folder))
        return (model, found) if output_loading_info else model


def install(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Put uninitialised maps at the sites that a config's section `lrc` names. Raises ModelError for another format."""
    if section.get("format") != FORMAT:
        raise ModelError(
            "config.json: lrc.format",
            expected=f"format {FORMAT}",
            got=str(section.get("format")),
            hint="Update lrc-compiler",
        )
    prefix = str(getattr(model, "base_model_prefix", ""))
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else previous)
    try:
        for fqn, structure in section["sites"].items():
            found = _place(model, fqn, prefix)
            if found is not None:
                place(model, found, restore_module(structure))
        for name, shape in section.get("shapes", {}).items():
            resize(model, _place(model, name.rpartition(".")[0], prefix), name.rpartition(".")[2], shape)
        attributes = {_place(model, name, prefix): own for name, own in section.get("attributes", {}).items()}
        set_attributes(model, {name: own for name, own in attributes.items() if name is not None})
        for module in section.get("idle", ()):
            found = _place(model, module, prefix)
            if found is not None:
                model.set_submodule(found, nn.Identity())
    finally:
        torch.set_default_dtype(previous)


def resize(model: nn.Module, owner: str | None, name: str, shape: list[int]) -> None:
    """Let a tensor of a model have another shape; its numbers are read afterwards."""
    if owner is not None:
        module = model.get_submodule(owner)
        held: Any = module._parameters if name in module._parameters else module._buffers
        old = held[name]
        new = torch.empty(shape, dtype=old.dtype)
        held[name] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _place(model: nn.Module, fqn: str, prefix: str) -> str | None:
    """Return the name of a site in a model that may be the body of the saved one, or hold it; None if it lacks the site."""
    for name in (fqn, fqn.removeprefix(f"{prefix}."), f"{prefix}.{fqn}"):
        try:
            model.get_submodule(name)
        except AttributeError:
            if not owned(model, name):
                continue
        return name
    return None


def placed_names(model: nn.Module, shared: Mapping[str, str]) -> dict[str, str]:
    """Return the names of shared factors as they are in a model that may be the body of the saved one, or hold it."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {}
    for pair in shared.items():
        owners = [_place(model, name.rpartition(".")[0], prefix) for name in pair]
        if None not in owners:
            name, stored = (f"{owner}.{whole.rpartition('.')[2]}" for owner, whole in zip(owners, pair, strict=True))
            found[name] = stored
    return found


def register() -> None:
    """Let the auto classes find our model types. Doing so twice changes nothing."""
    mapping = _auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Configs):
        mapping._extra_content = _Configs(mapping._extra_content)
