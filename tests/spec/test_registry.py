"""Registries: one name, one function; unknown names offer the nearest; entry points of strangers count like ours."""

from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from lrc.spec.base import SpecModel, Tagged
from lrc.spec.registry import EXPORTERS, METRICS, PASSES, RANKS, SOLVERS, Registered, Registry, tag_of


class Halve(Tagged):
    """Half of everything."""

    type: Literal["halve"] = "halve"
    share: float = Field(default=0.5, gt=0, description="what is kept")


class Double(Tagged):
    """Twice everything."""

    type: Literal["double"] = "double"


class OtherHalve(Tagged):
    """Another one of the same name."""

    type: Literal["halve"] = "halve"


class Energy(SpecModel):
    """Told apart by its one required key."""

    energy: float
    extra: int = 0


class Pdf(SpecModel):
    """Told apart by `format`."""

    format: Literal["pdf"] = "pdf"


@pytest.fixture
def things() -> Registry:
    registry = Registry("thing", "lrc.tests.none")
    registry.register(registry.rule(Halve)(halve))
    registry.register(registry.rule(Double)(double))
    return registry


def halve(x: int, options: Halve) -> float:
    return x * options.share


def double(x: int, options: Double) -> float:
    return x * 2.0


def another(x: int, options: Any) -> float:
    return 0.0


def test_a_rule_calls_its_function_and_knows_its_options(things: Registry) -> None:
    rule = things.get("halve")
    assert rule(6, Halve()) == 3.0
    assert rule.options is Halve
    assert things.for_options(Double())(3, Double()) == 6.0
    assert things.names() == ["double", "halve"]


def test_the_decorator_registers_nothing() -> None:
    registry = Registry("thing", "lrc.tests.none")
    registry.rule(Halve)(halve)
    assert registry.names() == []


def test_registering_twice_raises_and_names_both_functions(things: Registry) -> None:
    with pytest.raises(ValueError, match="thing 'halve' is registered twice") as caught:
        things.register(things.rule(OtherHalve)(another))
    assert "test_registry.halve and test_registry.another" in str(caught.value)
    assert things.get("halve").function is halve


def test_registering_the_same_rule_again_is_nothing_new(things: Registry) -> None:
    things.register(things.get("halve"))
    assert things.names() == ["double", "halve"]


def test_an_unknown_name_lists_the_known_ones_and_offers_the_nearest(things: Registry) -> None:
    with pytest.raises(ValueError, match=r"unknown thing 'halv'; known: double, halve. Did you mean 'halve'\?"):
        things.get("halv")
    with pytest.raises(ValueError, match=r"unknown thing 'zzz'; known: double, halve.$"):
        things.get("zzz")


def test_the_tag_is_the_type_the_format_or_the_one_required_key() -> None:
    assert tag_of(Halve) == "halve"
    assert tag_of(Pdf) == "pdf"
    assert tag_of(Energy) == "energy"


def test_options_without_a_tag_are_refused() -> None:
    class Nothing(SpecModel):
        value: int = 0

    class Two(SpecModel):
        one: int
        two: int

    for options in (Nothing, Two):
        with pytest.raises(TypeError, match="needs a `type` with a default, or exactly one required key"):
            tag_of(options)


def test_entry_points_are_read_once_ours_first_one_rule_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("thing", "lrc.tests.things")
    found = {"stranger": registry.rule(Double)(double), "builtin": (registry.rule(Halve)(halve),)}
    asked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint(name, name, group) for name in found]

    monkeypatch.setattr("lrc.spec.registry.entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", lambda entry: found[entry.name])
    assert [rule.name for rule in registry] == ["halve", "double"]
    assert registry.names() == ["double", "halve"]
    assert asked == ["lrc.tests.things"]


def test_a_stranger_that_takes_a_name_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("thing", "lrc.tests.things")
    found = {"builtin": (registry.rule(Halve)(halve),), "stranger": registry.rule(OtherHalve)(another)}
    monkeypatch.setattr(
        "lrc.spec.registry.entry_points", lambda group: [EntryPoint(name, name, group) for name in reversed(found)]
    )
    monkeypatch.setattr(EntryPoint, "load", lambda entry: found[entry.name])
    with pytest.raises(ValueError, match=r"registered twice: test_registry.halve and test_registry.another"):
        registry.names()


def holder_of(registry: Registry) -> type[SpecModel]:
    class Holds(SpecModel):
        thing: Annotated[SpecModel, Registered(registry)]

    return Holds


def test_a_bare_word_stands_for_an_object_with_that_type_alone(things: Registry) -> None:
    model = holder_of(things)
    word, mapping = model.model_validate({"thing": "halve"}), model.model_validate({"thing": {"type": "halve"}})
    assert word == mapping == model.model_validate({"thing": Halve()})
    assert word.model_dump() == {"thing": {"type": "halve", "share": 0.5}}


@pytest.mark.parametrize("value", [3, None, [], {}, {"type": 3}, {"share": 0.5}])
def test_what_names_no_rule_is_refused_with_the_known_ones(things: Registry, value: Any) -> None:
    with pytest.raises(ValidationError, match="expected a thing: a name, or a mapping with `type`; known: double, halve"):
        holder_of(things).model_validate({"thing": value})


def test_options_are_validated_at_their_place(things: Registry) -> None:
    with pytest.raises(ValidationError) as caught:
        holder_of(things).model_validate({"thing": {"type": "halve", "share": 0}})
    assert [error["loc"] for error in caught.value.errors()] == [("thing", "share")]


def test_options_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Halve().share = 0.3  # type: ignore[misc]
    for wrong in ("0.5", True, None):
        with pytest.raises(ValidationError, match="share"):
            Halve.model_validate({"share": wrong})


def test_what_comes_with_lrc_is_registered() -> None:
    assert set(PASSES.names()) >= {"factorize", "merge"}
    assert set(SOLVERS.names()) >= {"kfac", "whitened", "afm", "lord", "svd", "gram"}
    assert set(RANKS.names()) >= {"rank", "params_kept", "energy", "fraction", "breakeven"}
    assert set(METRICS.names()) >= {"spearman", "perplexity", "accuracy"}
    assert set(EXPORTERS.names()) >= {"hf", "onnx", "aoti", "pt2", "torch_compile"}


def test_every_option_that_comes_with_lrc_is_described() -> None:
    for registry in (PASSES, SOLVERS, RANKS, METRICS, EXPORTERS):
        for rule in registry:
            assert rule.options.__doc__, rule.name
            for name, field in rule.options.model_fields.items():
                assert field.description or name in ("type", "format"), f"{rule.name}.{name}"
