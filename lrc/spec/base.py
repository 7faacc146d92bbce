"""The base of every options model."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class SpecModel(BaseModel):
    """A frozen model that refuses unknown keys and does not convert between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tagged(SpecModel):
    """An options model that the spec tells apart by its key `type`."""

    type: Any
    tag_key: ClassVar[str] = "type"

    @classmethod
    def tag(cls) -> str:
        """Return the one value that `type` may have, as the `Literal` of the subclass states it."""
        return str(cls.model_fields["type"].default)
