"""The JSON Schema: of the whole document, the committed file, and what the loader takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrc.spec.document import Document
from lrc.spec.registry import EXPORTERS, METRICS, PASSES, RANKS, SOLVERS
from lrc.spec.schema import json_schema, schema_text

COMMITTED = Path(__file__).resolve().parents[2] / "lrc.schema.json"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(schema_text())
    return made


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in the schema."""
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from nodes(value)


def test_the_text_is_json_and_the_same_every_time(schema: dict[str, Any]) -> None:
    assert schema == json_schema()
    assert schema_text() == schema_text()
    assert schema_text().endswith("}\n")


@pytest.mark.skipif(not COMMITTED.is_file(), reason=f"skipped: {COMMITTED.name} is not there (`make schema` writes it)")
def test_the_committed_schema_is_the_generated_one() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), "run `make schema` and read the difference"


def test_it_is_a_schema_of_the_document(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["version"]
    assert set(schema["properties"]) == {f.alias or name for name, f in Document.model_fields.items()} | {"preset", "imports"}
    assert schema["properties"]["version"]["const"] == 1


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        reference = node.get("$ref")
        if isinstance(reference, str):
            assert reference.startswith("#/$defs/")
            assert reference.removeprefix("#/$defs/") in schema["$defs"]


def test_every_object_refuses_unknown_keys_and_describes_its_own(schema: dict[str, Any]) -> None:
    objects = [node for node in nodes(schema) if isinstance(node.get("properties"), dict) and node.get("type") == "object"]
    assert len(objects) > 15
    for node in objects:
        assert node["additionalProperties"] is False, node["title"]
        for name, field in node["properties"].items():
            assert "description" in field or name in ("type", "format") or "$ref" in field, f"{node['title']}.{name}"


def choices(field: dict[str, Any], schema: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The bare words, and the tags of the mappings, that a field takes; a mapping may be one of the schema's definitions."""
    options = [schema["$defs"][o["$ref"].rsplit("/", 1)[-1]] if "$ref" in o else o for o in field["anyOf"]]
    words = {option["const"] for option in field["anyOf"] if "const" in option}
    models = [option["properties"] for option in options if "properties" in option]
    tags = {(p.get("type") or p.get("format") or {}).get("const") for p in models}
    return words, tags - {None}


def test_words_and_mappings_of_every_kind_are_offered(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    fields = {PASSES: schema["$defs"]["Pass"], EXPORTERS: properties["export"]["items"]}
    fields[METRICS] = schema["$defs"]["EvaluateSpec"]["properties"]["metrics"]["items"]
    factorize = next(o for o in fields[PASSES]["anyOf"] if o.get("title") == "Factorize")
    fields[SOLVERS] = factorize["properties"]["solver"]
    for registry, field in fields.items():
        words, tags = choices(field, schema)
        assert words == tags == set(registry.names()), registry.kind


def test_a_rank_is_a_number_or_one_policy(schema: dict[str, Any]) -> None:
    passes = schema["$defs"]["Pass"]["anyOf"]
    rank = next(o for o in passes if o.get("title") == "Factorize")["properties"]["rank"]
    number, *policies = rank["anyOf"]
    assert number == {"type": "integer", "minimum": 1}
    assert {tuple(policy["required"]) for policy in policies} == {(name,) for name in RANKS.names() if name != "rank"}


def test_presets_and_imports_are_names_or_lists_of_names(schema: dict[str, Any]) -> None:
    for key in ("preset", "imports"):
        field = schema["properties"][key]
        assert field["type"] == ["string", "array"]
        assert field["items"] == {"type": "string"}


def test_defaults_in_the_schema_are_those_of_the_models(schema: dict[str, Any]) -> None:
    for name, field in Document.model_fields.items():
        if field.is_required() or field.default is None:
            continue
        written = Document(version=1).model_dump(mode="json")[name]
        assert schema["properties"][field.alias or name]["default"] == written
