"""What an optimiser of the spec is given, and how one is registered."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from lrc.spec.base import Tagged
from lrc.spec.registry import OPTIMIZERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


class OptimizerOptions(Tagged):
    """Options that every optimiser has.

    per_layer: whether it may be run for every parameter alone; sharded: for a share of every parameter.
    """

    lr: float = Field(default=1e-3, ge=0, description="Learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False, description="Decay of the two running means.")
    eps: float = Field(default=1e-8, ge=0, description="Added to the root of the mean square.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled; matrices alone decay, not biases, norms and gates.")
    per_layer: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of the state of a parameter: two numbers for each of its own, where nothing else is said."""
        return 2 * shape.numel() * itemsize

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the optimiser's class."""
        return self.model_dump(exclude={"type"})


@dataclass(frozen=True)
class Trained:
    """What is trained, by name.

    gates: names of diagonals that are thresholded; pairs: names (A, B) of products B A; factors: name -> what the learning
    rate is multiplied by, 1 where there is none.
    """

    parameters: Mapping[str, Tensor]
    gates: frozenset[str] = frozenset()
    pairs: tuple[tuple[str, str], ...] = field(default=())
    factors: Mapping[str, float] = field(default_factory=dict)

    def groups(
        self,
        *,
        matrices: Mapping[str, Any] | None = None,
        gates: Mapping[str, Any] | None = None,
        plain: Collection[str] = (),
    ) -> list[dict[str, Any]]:
        """Return parameter groups for `torch.optim`: matrices with their options, vectors, and gates with theirs.

        plain: names of matrices that go without the options. Vectors (biases, norms) and gates do not decay. `lr_factor` of a
        group is what a schedule multiplies its learning rate by.
        """
        options = {"matrices": dict(matrices or {}), "plain": {}, "vectors": {"weight_decay": 0.0}}
        options["gates"] = {"weight_decay": 0.0, **(gates or {})}
        members: dict[tuple[str, float], list[Tensor]] = {}
        for name, value in self.parameters.items():
            of_matrix = "plain" if name in plain else "matrices"
            kind = "gates" if name in self.gates else of_matrix if value.ndim > 1 else "vectors"
            members.setdefault((kind, self.factors.get(name, 1.0)), []).append(value)
        ordered = sorted(members, key=lambda key: (list(options).index(key[0]), key[1]))
        return [{"params": members[kind, factor], **options[kind], "lr_factor": factor} for kind, factor in ordered]


def optimizer(options: type[OptimizerOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a function `(trained, options) -> torch.optim.Optimizer` to its options model (see `lrc.spec.registry`)."""
    return OPTIMIZERS.rule(options)
