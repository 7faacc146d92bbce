"""The base of every options model: frozen, strict, and helpful about keys that it does not know."""

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class SpecModel(BaseModel):
    """A frozen model that refuses unknown keys and does not convert between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        """Refuse unknown keys before anything else, so that one misspelt key gives one error, with the nearest key."""
        if not isinstance(data, dict):
            return data
        known = [field.alias or name for name, field in cls.model_fields.items()]
        errors = [unknown_key(key, known) for key in data if key not in known]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data


def unknown_key(key: Any, known: list[str]) -> InitErrorDetails:
    """Return the error of a key that is none of `known`: it names the nearest one, or all of them."""
    near = difflib.get_close_matches(str(key), known, n=1)
    offer = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
    error = PydanticCustomError("unknown_key", "unknown key `{key}`; {offer}", {"key": str(key), "offer": offer})
    return InitErrorDetails(type=error, loc=(str(key),), input=key)


class Tagged(SpecModel):
    """An options model that the spec tells apart by its key `type`."""

    type: Any
    tag_key: ClassVar[str] = "type"

    @classmethod
    def tag(cls) -> str:
        """Return the one value that `type` may have, as the `Literal` of the subclass states it."""
        return str(cls.model_fields["type"].default)
