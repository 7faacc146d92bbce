"""The JSON Schema of the spec, for editors; the one of the built-ins is committed as `lrc.schema.json`."""

import json
from typing import Any

from lrc.spec.document import Document


def json_schema() -> dict[str, Any]:
    """Return the schema of the spec with everything that is registered."""
    schema = Document.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    names = {"type": ["string", "array"], "items": {"type": "string"}}
    extra = {
        "preset": {"description": "A ready spec, or several, that this one builds on.", **names},
        "imports": {"description": "Files that this spec builds on, from its folder.", **names},
    }
    schema["properties"] = {**schema["properties"], **extra}
    return schema


def schema_text() -> str:
    """Return the schema as text with a final newline."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())
