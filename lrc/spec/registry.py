"""Registries: how passes, solvers, rank policies, metrics and exporters are found, ours and a stranger's alike.

A decorator (`registry.rule(Options)`) ties a function to its options model and does nothing else. What is available is
said in one place per kind: a package lists its rules under an entry-point group (`lrc.passes`, `lrc.solvers`, …), and
the value of an entry point is one rule or a tuple of rules. `register` adds one from Python.
"""

import difflib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, ParamSpec, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from lrc.spec.base import SpecModel

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Rule(Generic[P, R]):
    """A function tied to its options model; calling the rule calls the function."""

    name: str
    options: type[SpecModel]
    function: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        return self.function(*args, **kwargs)

    @property
    def where(self) -> str:
        """The function's module and name, for messages."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def tag_of(options: type[SpecModel]) -> str:
    """Return the word by which a spec names `options`: the value of its `type` (`format`), or its one required key."""
    for key in ("type", "format"):
        if key in options.model_fields:
            return str(options.model_fields[key].default)
    required = [name for name, field in options.model_fields.items() if field.is_required()]
    if len(required) != 1:
        raise TypeError(f"{options.__qualname__} needs a `type` with a default, or exactly one required key")
    return required[0]


def with_article(word: str) -> str:
    """Return `a pass`, `an export format`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


class Registry:
    """The rules of one kind, by name. Entry points are read at the first look-up, never at import."""

    def __init__(self, kind: str, group: str, *, tag: str = "type") -> None:
        self.kind = kind
        self.group = group
        self.tag = tag
        self._rules: dict[str, Rule[Any, Any]] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def rule(self, options: type[SpecModel]) -> Callable[[Callable[P, R]], Rule[P, R]]:
        """Tie the decorated function to `options`. Registers nothing."""

        def decorate(function: Callable[P, R]) -> Rule[P, R]:
            return Rule(tag_of(options), options, function)

        return decorate

    def register(self, rule: Rule[Any, Any]) -> None:
        """Add a rule. Raises ValueError when the name is taken, and names both functions."""
        known = self._rules.get(rule.name)
        if known is not None and known != rule:
            raise ValueError(f"{self.kind} {rule.name!r} is registered twice: {known.where} and {rule.where}")
        self._rules[rule.name] = rule

    def load(self) -> None:
        """Read the entry points of the group, once."""
        if self._loaded:
            return
        with self._lock:
            for entry in sorted(entry_points(group=self.group), key=lambda e: (e.name != "builtin", e.name, e.value)):
                found = entry.load()
                for rule in found if isinstance(found, tuple) else (found,):
                    self.register(rule)
            self._loaded = True

    def __iter__(self) -> Iterator[Rule[Any, Any]]:
        self.load()
        return iter(self._rules.values())

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return sorted(rule.name for rule in self)

    def get(self, name: str) -> Rule[Any, Any]:
        """Return the rule called `name`. Raises ValueError that lists the known names and offers the nearest."""
        self.load()
        if name not in self._rules:
            near = difflib.get_close_matches(name, self._rules, n=1)
            offer = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}.{offer}")
        return self._rules[name]

    def for_options(self, options: SpecModel) -> Rule[Any, Any]:
        """Return the rule whose options model `options` is an instance of."""
        return self.get(tag_of(type(options)))


class Registered:
    """Annotation of a field whose value is an options model out of a registry.

    A bare word stands for an object with that `type` alone. `Annotated[SpecModel, Registered(SOLVERS)]`. without: names that
    have no place there, for a registry that the field's own model is in.
    """

    def __init__(self, registry: Registry, *, optional: bool = False, without: tuple[str, ...] = ()) -> None:
        self.registry = registry
        self.optional = optional
        self.without = without

    def names(self) -> list[str]:
        """Return the names that may be given."""
        return [name for name in self.registry.names() if name not in self.without]

    def validate(self, value: Any) -> SpecModel | None:
        """Turn a word, a mapping or an options object into the options object; None stays, where it may."""
        if isinstance(value, SpecModel) or (value is None and self.optional):
            return value
        tag = self.registry.tag
        if isinstance(value, str):
            value = {tag: value}
        if not isinstance(value, dict) or not isinstance(value.get(tag), str):
            raise PydanticCustomError(
                "registered_type",
                "expected {kind}: a name, or a mapping with `{tag}`; known: {known}",
                {"kind": with_article(self.registry.kind), "tag": tag, "known": ", ".join(self.names())},
            )
        if value[tag] in self.without:
            raise PydanticCustomError(
                "registered_place",
                "{kind} `{name}` has no place here; known: {known}",
                {"kind": self.registry.kind, "name": value[tag], "known": ", ".join(self.names())},
            )
        return self.registry.get(value[tag]).options.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(plain)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if self.without:  # rules within one of them: `lrc.spec.schema` says where their schema is
            return {"$comment": self.registry.kind}
        words = [{"const": name} for name in self.names()]
        models = [handler(rule.options.__pydantic_core_schema__) for rule in self.registry]
        nothing: list[dict[str, Any]] = [{"type": "null"}] if self.optional else []
        return {"anyOf": [*words, *models, *nothing]}


def plain(options: SpecModel | None) -> dict[str, Any] | None:
    """Return options as plain data."""
    return None if options is None else options.model_dump()


PASSES = Registry("pass", "lrc.passes")
SOLVERS = Registry("solver", "lrc.solvers")
SPLITTERS = Registry("splitter", "lrc.splitters")
WAYS = Registry("way", "lrc.ways")
PRUNERS = Registry("pruning method", "lrc.pruners")
ADAPTERS = Registry("adapter", "lrc.adapters")
INITIALISERS = Registry("initialiser", "lrc.initialisers")
RANKS = Registry("rank policy", "lrc.ranks")
ALLOCATORS = Registry("allocator", "lrc.allocators")
METRICS = Registry("metric", "lrc.metrics")
EXPORTERS = Registry("export format", "lrc.exporters", tag="format")
OPTIMIZERS = Registry("optimizer", "lrc.optimizers")
OBJECTIVES = Registry("objective", "lrc.objectives")
RECIPES = Registry("recipe", "lrc.recipes")
