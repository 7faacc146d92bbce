"""How a spec names a format: by a short word, or by all of its settings."""

from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from lrc.formats.base import NumberFormat
from lrc.formats.integer import Integer
from lrc.formats.normalfloat import NormalFloat

KINDS: tuple[type[NumberFormat], ...] = (NormalFloat, Integer)
FORMATS: dict[str, NumberFormat] = {
    made.name: made
    for made in (
        *(NormalFloat(bits=bits) for bits in (2, 3, 4, 8)),
        *(Integer(bits=bits) for bits in (4, 8)),
    )
}


def format_of(value: Any) -> NumberFormat:
    """Return the format that a word (`nf4`) or a mapping with `type` (`nf`, `int`) names."""
    if isinstance(value, NumberFormat):
        return value
    if isinstance(value, str) and value in FORMATS:
        return FORMATS[value]
    kinds = {kind.tag(): kind for kind in KINDS}
    if isinstance(value, dict) and value.get("type") in kinds:
        return kinds[value["type"]].model_validate(value)
    raise PydanticCustomError(
        "number_format",
        "expected a number format: {words}, or a mapping with `type: nf` or `type: int`",
        {"words": ", ".join(FORMATS)},
    )


class FormatValue:
    """Annotation of a field that holds a number format."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            format_of, serialization=core_schema.plain_serializer_function_ser_schema(lambda v: v.model_dump())
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(FORMATS)}, *(kind.model_json_schema() for kind in KINDS)]}


FormatField = Annotated[NumberFormat, FormatValue()]
