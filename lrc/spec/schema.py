"""The JSON Schema of the spec, for editors; the one of the built-ins is committed as `lrc.schema.json`."""

import json
from typing import Any

from lrc.spec.document import Document
from lrc.spec.registry import PASSES


def json_schema() -> dict[str, Any]:
    """Return the schema of the spec with everything that is registered."""
    schema = Document.model_json_schema(by_alias=True)
    listed = schema["properties"]["passes"]
    schema["$defs"]["Pass"], listed["items"] = listed["items"], {"$ref": "#/$defs/Pass"}
    schema["$defs"] = with_passes(schema["$defs"])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    names = {"type": ["string", "array"], "items": {"type": "string"}}
    extra = {
        "preset": {"description": "A ready spec, or several, that this one builds on.", **names},
        "imports": {"description": "Files that this spec builds on, from its folder.", **names},
    }
    schema["properties"] = {**schema["properties"], **extra}
    return schema


def with_passes(node: Any) -> Any:
    """Return a schema in which passes within a pass are those of the document."""
    if isinstance(node, dict):
        within = node.get("$comment") == PASSES.kind
        return {"$ref": "#/$defs/Pass"} if within else {key: with_passes(value) for key, value in node.items()}
    return [with_passes(item) for item in node] if isinstance(node, list) else node


def schema_text() -> str:
    """Return the schema as text with a final newline."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())
