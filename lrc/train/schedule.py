"""The learning rate over the steps."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lrc.spec.base import SpecModel


class Schedule(SpecModel):
    """How the learning rate rises and falls."""

    type: Literal["constant", "linear", "cosine"] = Field(default="linear", description="The way down after the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps in which the rate rises linearly from 0.")
    warmup_ratio: float = Field(default=0.0, ge=0, le=1, description="The same as a share of all steps.")
    final: float = Field(default=0.0, ge=0, le=1, description="Share of the rate that is left at the last step.")

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give `warmup_steps` or `warmup_ratio`, not both")
        return self

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rate is multiplied by at `step` of `steps`, counted from 0."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.type == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        down = 1 - done if self.type == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * down


def _from_word(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


ScheduleField = Annotated[
    Schedule, BeforeValidator(_from_word, json_schema_input_type=Schedule | Literal["constant", "linear", "cosine"])
]
