"""How a training run goes: its steps, the part of them that is run at once, and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass, field

from lrc.train.schedule import Schedule


@dataclass(frozen=True)
class Validation:
    """How the run is judged while it goes.

    measure: returns a figure; every: steps between two; patience: how many without a gain before the run stops, or None;
    greater: whether a greater figure is better.
    """

    measure: Callable[[], float]
    every: int
    patience: int | None = None
    greater: bool = False


@dataclass(frozen=True)
class Part:
    """The steps that are run at once, from `first` to before `end`. final: whether the run ends with them."""

    first: int
    end: int
    final: bool = True


@dataclass(frozen=True)
class Settings:
    """How a run goes. accumulate: batches a step; clip: largest norm of the gradient, or None; bfloat16: mixed precision.

    part: which of the steps; all of them without it.
    """

    steps: int
    batch_size: int = 16
    accumulate: int = 1
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    bfloat16: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    part: Part | None = None

    @property
    def running(self) -> Part:
        """The part that is run."""
        return self.part or Part(0, self.steps)
