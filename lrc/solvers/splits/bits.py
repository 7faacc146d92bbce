"""One budget over the formats of all sites: bits a number, or the size of the model."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from lrc.spec.base import SpecModel


class BitsBudget(SpecModel):
    """Exactly one of the two."""

    bits: float | None = Field(default=None, gt=0, description="a number, on average")
    size_mb: float | None = Field(default=None, gt=0, description="of the whole model, in 10^6 bytes")


def budget_of(value: Any) -> BitsBudget | None:
    """Return the budget that a number or `{size_mb: …}` means."""
    if value is None or isinstance(value, BitsBudget):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return BitsBudget.model_validate({"bits": float(value)})
    if isinstance(value, dict) and len(value) == 1:
        return BitsBudget.model_validate({key: float(v) if isinstance(v, int) else v for key, v in value.items()})
    raise PydanticCustomError("bits", "expected bits a number, such as 2.75, or {{size_mb: …}}")


BitsField = Annotated[
    BitsBudget | None,
    BeforeValidator(budget_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {
                    "type": "object",
                    "title": "BitsBudget",
                    "properties": {
                        "size_mb": {"type": "number", "exclusiveMinimum": 0, "description": "of the whole model, in 10^6 bytes"}
                    },
                    "required": ["size_mb"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]
