"""What hangs on training: a penalty, something before and after every step, and a last word on the maps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrc.data import Batch
from lrc.program import Program
from lrc.spec.base import Tagged
from lrc.spec.registry import RECIPES, Rule
from lrc.train.data import Examples, TrainData

P = ParamSpec("P")
R = TypeVar("R")


class RecipeOptions(Tagged):
    """Options of a recipe.

    teacher: it wants an objective that looks at the uncompressed model; pauses: passes may run while it trains.
    """

    teacher: ClassVar[bool] = False
    pauses: ClassVar[bool] = True

    def moved(self, parameters: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
        """Return what the optimizer moves, by name: the trained parameters themselves, where nothing else is said."""
        return parameters

    def held_bytes(self, trained: Mapping[str, Tensor]) -> int:
        """Return the bytes that the recipe keeps beside the parameters."""
        return 0

    def step_bytes(self, trained: Mapping[str, Tensor]) -> int:
        """Return what a step keeps for the recipe until its backward pass, beside the model's own graph, in bytes."""
        return 0


class Loss(Protocol):
    """The objective on a batch."""

    def __call__(
        self, batch: Batch, generator: torch.Generator, *, judged: bool = False, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the mean loss, with its graph. judged: in eval mode; values: in place of parameters, by name."""


@dataclass(frozen=True)
class Own:
    """What a recipe needs for losses of its own.

    module: is in training mode or in eval mode; examples: of the training; read: reads other data as the objective does.
    """

    module: nn.Module
    loss: Loss
    examples: Examples
    batch_size: int
    read: Callable[[TrainData], Examples]


@dataclass(frozen=True)
class Context:
    """What a recipe is given.

    fqns: the trained sites; gates: names of gates; steps, per_epoch: of the run, in steps; moved: what its options let the
    optimizer move.
    """

    program: Program
    fqns: Sequence[str]
    parameters: Mapping[str, Tensor]
    gates: Sequence[str]
    optimizer: Optimizer
    steps: int
    per_epoch: int
    seed: int = 0
    own: Own | None = None
    moved: Mapping[str, Tensor] = field(default_factory=dict)


class Recipe:
    """A recipe that does nothing; others override what they need. `done` counts finished steps."""

    def before(self, done: int) -> None:
        """Get ready for a step."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of a step, with its graph, or None."""
        return None

    def graded(self, done: int) -> None:
        """Look at the gradients of a step, after they were shortened and before they are used."""

    def after(self, done: int) -> None:
        """Act on the parameters after a step."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what the recipe changes beside the parameters, by name: kept with them in checkpoints and as the best."""
        return {}

    def comparable(self) -> bool:
        """Say whether the parameters are of the kind that the run ends with; no others are remembered as the best."""
        return True

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data and tensors."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    def pause(self) -> list[str]:
        """Leave the program as passes that run while it is trained may see it; what follows has a recipe of its own."""
        return []

    def finish(self) -> list[str]:
        """Leave the program as the method says when training is over; return what the plan should mention."""
        return []


def recipe(options: type[RecipeOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a function `(context, options) -> Recipe` to its options model (see `lrc.spec.registry`)."""
    return RECIPES.rule(options)
