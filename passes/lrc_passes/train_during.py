"""Passes that run while a `train` goes on: which of them, and after which step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from lrc.errors import UsageError
from lrc.program import Program
from lrc.run import Decision, PassOptions, Session
from lrc.run.passes import pass_for
from lrc.spec.base import SpecModel
from lrc.spec.registry import PASSES, Registered
from lrc.train.distributed import world
from lrc.train.settings import Part

Share = Annotated[float, Field(gt=0, lt=1)]
Inner = Annotated[PassOptions, Registered(PASSES, without=("train",))]


class During(SpecModel):
    """Passes that run in the midst of training, which then goes on with what they left."""

    at: Share | list[Share] = Field(default=0.5, description="When they run, as a share of the steps; several: every time.")
    passes: list[Inner] = Field(min_length=1, description="The passes, in order; any but `train`.")

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.at == []:
            raise ValueError("give one share of the steps at least, such as `at: 0.5`")
        return self

    @property
    def shares(self) -> list[float]:
        """When they run."""
        return self.at if isinstance(self.at, list) else [self.at]


def _from_pass(value: Any) -> Any:
    """Take a pass alone as one that runs at the middle."""
    bare = isinstance(value, str | PassOptions) or (isinstance(value, dict) and "type" in value)
    return {"passes": [value]} if bare else value


DuringField = Annotated[During, BeforeValidator(_from_pass, json_schema_input_type=During | Inner)]


@dataclass(frozen=True)
class Stretch:
    """Steps that are trained at once, and the passes that run after them."""

    part: Part
    passes: tuple[PassOptions, ...] = ()


def in_order(during: Sequence[During]) -> list[tuple[float, PassOptions]]:
    """Return the passes in the order in which they run, as often as they do, each with its share of the steps."""
    found = [(share, options) for entry in during for share in entry.shares for options in entry.passes]
    return sorted(found, key=lambda pair: pair[0])


def stretches(during: Sequence[During], steps: int) -> list[Stretch]:
    """Return the run in stretches. Raises UsageError where it has too few steps for a pass to run in its midst."""
    at: dict[int, list[PassOptions]] = {}
    for share, options in in_order(during):
        at.setdefault(min(max(1, round(share * steps)), steps - 1), []).append(options)
    if 0 in at:
        raise UsageError("train.during", expected="two steps at least, for passes to run between", got=str(steps))
    ends = [*sorted(at), steps]
    return [
        Stretch(Part(first, end, final=end == steps), tuple(at.get(end, ())))
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def check_during(options: Any, where: str) -> None:
    """Raise UsageError for what cannot be stopped on the way."""
    if not options.during:
        return
    if options.recipe is not None and not options.recipe.pauses:
        raise UsageError(
            where, message=f"the recipe `{options.recipe.type}` decides over the whole run, so no pass may run `during` it",
            hint="Put the pass after this one, and another `train` after that",
        )  # fmt: skip
    if options.distributed == "fsdp2" and world().size > 1:
        raise UsageError(where, message="`during` wants whole parameters", hint="Set `distributed: ddp`")


def carried_out(program: Program, session: Session, passes: Sequence[Any], index: int, done: int) -> Iterator[Decision]:
    """Run passes between two steps; yield their decisions."""
    for options in passes:
        half = pass_for(options)
        decide = getattr(half, "plan_bare", half.plan)
        for d in half.apply(program, session, options, decide(program, session, options, index)):
            yield replace(d, notes=(*d.notes, f"after step {done} of training"))
