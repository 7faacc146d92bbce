"""What a spec may use: every name with a line about it, and the options of one."""

import json
import types
import typing
from importlib import resources
from typing import Any, Literal

from pydantic.fields import FieldInfo

from lrc.errors import UsageError
from lrc.spec.base import SpecModel
from lrc.spec.load import PRESETS, preset, preset_names
from lrc.spec.registry import (
    ADAPTERS,
    ALLOCATORS,
    EXPORTERS,
    INITIALISERS,
    METRICS,
    OBJECTIVES,
    OPTIMIZERS,
    PASSES,
    PRUNERS,
    RANKS,
    RECIPES,
    SOLVERS,
    SPLITTERS,
    WAYS,
    Registered,
    Registry,
    plain,
)

REGISTRIES: dict[str, Registry] = {
    "passes": PASSES, "solvers": SOLVERS, "splitters": SPLITTERS, "pruners": PRUNERS, "ways": WAYS, "ranks": RANKS,
    "allocators": ALLOCATORS, "adapters": ADAPTERS, "initialisers": INITIALISERS, "optimizers": OPTIMIZERS,
    "objectives": OBJECTIVES, "recipes": RECIPES, "metrics": METRICS, "exports": EXPORTERS,
}  # fmt: skip


def names(kind: str | None = None) -> dict[str, list[str]]:
    """Return the known names by kind. Raises UsageError for an unknown kind."""
    found = {key: registry.names() for key, registry in REGISTRIES.items()} | {"presets": preset_names()}
    if kind is None:
        return found
    if kind not in found:
        raise UsageError(f"list {kind}", expected=f"one of {', '.join(found)}", got=kind)
    return {kind: found[kind]}


def summaries(kind: str) -> list[dict[str, str]]:
    """Return a row for every name of a kind: the name, and the first line about it. Raises UsageError for an unknown kind."""
    if kind == "presets":
        return [{"name": name, "about": _comment(name)} for name in preset_names()]
    return [{"name": name, "about": _first_line(REGISTRIES[kind].get(name).options)} for name in names(kind)[kind]]


def options_of(kind: str, name: str) -> list[dict[str, str]]:
    """Return a row for every option of what `name` names: the option, what it takes, its default, and what it is.

    Raises UsageError for an unknown kind or name.
    """
    names(kind)
    try:
        rule = REGISTRIES[kind].get(name)
    except ValueError as error:
        raise UsageError(f"list {kind} {name}", message=str(error)) from None
    fields = rule.options.model_fields.items()
    return [
        {"option": key, "takes": _takes(field), "default": _default(field), "about": field.description or ""}
        for key, field in fields
        if key not in ("type", "format")
    ]


def preset_text(name: str) -> str:
    """Return the file of a preset. Raises SpecError for an unknown one."""
    preset(name)
    return (resources.files(PRESETS) / f"{name}.yaml").read_text(encoding="utf-8")


def _first_line(options: type[SpecModel]) -> str:
    return (options.__doc__ or "").strip().partition("\n")[0]


def _comment(name: str) -> str:
    lines = preset_text(name).splitlines()
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("#") else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, SpecModel):
        value = (plain(value) or {}).get("type", plain(value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _takes(field: FieldInfo) -> str:
    """Return the words or the types that a field takes, with its bounds."""
    known = next((m.registry.names() for m in field.metadata if isinstance(m, Registered)), None)
    if known is not None:
        return " | ".join(known)
    bounds = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)]
    return " ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """Return an annotation as a reader of YAML sees it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_words, inside)))
    if origin is typing.Annotated:
        known = next((m.registry.names() for m in inside[1:] if isinstance(m, Registered)), None)
        return " | ".join(known) if known else _words(inside[0])
    if origin in (list, tuple):
        return f"list of {' | '.join(dict.fromkeys(_words(a) for a in inside if a is not Ellipsis))}"
    if origin is dict:
        return f"mapping of {_words(inside[0])} to {_words(inside[1])}"
    if annotation is type(None):
        return "null"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), "mapping"
    )
