"""The field `allocate` of a spec: who shares a budget, and with which options."""

from typing import Annotated, Any, Literal, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from lrc.ranks.learned import LearnedAllocation

AllocateWord = Literal["auto", "global", "uniform", "exact", "loss_log_inverse", "learned"]


class AllocateValue:
    """Annotation of the field `allocate`: a word, or a mapping of the options of an allocator that has some."""

    def validate(self, value: Any) -> Any:
        """Return the word or the options model. Raises what pydantic reports with its place."""
        if isinstance(value, dict):
            return LearnedAllocation.model_validate(value)
        if value in get_args(AllocateWord) or isinstance(value, LearnedAllocation):
            return value
        *words, last = (repr(word) for word in get_args(AllocateWord))
        known = f"{', '.join(words)} or {last}"
        raise PydanticCustomError("literal_error", "input should be {known}", {"known": known})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(_as_written)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        words = {"type": "string", "enum": list(get_args(AllocateWord))}
        return {"anyOf": [words, handler(LearnedAllocation.__pydantic_core_schema__)]}


def _as_written(value: Any) -> Any:
    return value.model_dump() if isinstance(value, LearnedAllocation) else value


AllocateField = Annotated[AllocateWord | LearnedAllocation, AllocateValue()]
