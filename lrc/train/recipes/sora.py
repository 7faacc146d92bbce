"""sora: gates that are driven to exact zeros, by a threshold that rises in stages."""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import UsageError
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class SoraRecipe(RecipeOptions):
    """Sparsify gates; needs the optimizer proximal_adamw or proximal_sgd, whose `threshold` is the first one."""

    type: Literal["sora"] = "sora"
    l1: float = Field(default=1e-3, ge=0, description="Weight of the mean magnitude of all gates, which is added to the loss.")
    to: float | None = Field(default=None, ge=0, description="The last threshold; the first one all the way without it.")
    values: int = Field(default=7, ge=2, description="How many thresholds, the first one counted.")
    each: int = Field(default=100, ge=1, description="Steps with every threshold after the first, at the end of the run.")
    spacing: Literal["linear", "log_linear", "exp_linear"] = Field(default="linear", description="Of the thresholds.")


@recipe(SoraRecipe)
def sora(context: Context, options: SoraRecipe) -> Recipe:
    """Return the recipe. Raises UsageError without gates, without a proximal optimizer, and for too few steps.

    Source: Ding et al. (2023), arXiv:2311.11696, equation 8 and algorithm 1.
    """
    if not context.gates:
        raise UsageError("recipe sora", expected="gates among what is trained", got="none", hint="Adapt with `method: sora`")
    gates = [context.parameters[name] for name in context.gates]
    ids = {id(g) for g in gates}
    groups = [g for g in context.optimizer.param_groups if any(id(p) in ids for p in g["params"])]
    if not all("threshold" in group for group in groups):
        raise UsageError("recipe sora", expected="optimizer proximal_adamw or proximal_sgd", got="one without a threshold")
    if options.to is not None and (options.values - 1) * options.each >= context.steps:
        raise UsageError(
            "recipe sora", expected=f"more than {(options.values - 1) * options.each} steps, (values - 1) * each",
            got=str(context.steps), hint="Raise `steps`, or lower `each`",
        )  # fmt: skip
    return Sparsify(gates, groups, options, context.steps)


def thresholds(first: float, options: SoraRecipe) -> list[float]:
    """Return the thresholds in order: evenly spaced, or by their exponentials, or geometrically (a first one of 0 stays)."""
    if options.to is None:
        return [first]
    n, last = options.values, options.to
    if options.spacing == "linear":
        return torch.linspace(first, last, n, dtype=torch.float64).tolist()
    if options.spacing == "log_linear":
        return torch.linspace(math.exp(first), math.exp(last), n, dtype=torch.float64).log().tolist()
    if first <= 0 or last <= 0:
        raise UsageError("recipe sora", expected="positive thresholds for `spacing: exp_linear`", got=f"{first} to {last}")
    return torch.logspace(math.log10(first), math.log10(last), n, dtype=torch.float64).tolist()


class Sparsify(Recipe):
    """Sets the threshold of the gates' groups by the step, and adds the mean magnitude of the gates to the loss."""

    def __init__(self, gates: list[Tensor], groups: list[dict[str, Any]], options: SoraRecipe, steps: int) -> None:
        self.gates, self.groups, self.options, self.steps = gates, groups, options, steps
        self.values = thresholds(groups[0]["threshold"], options)
        self.done = 0

    def at(self, done: int) -> float:
        """Return the threshold of a step: the first one until the stages at the end begin."""
        left = self.steps - (len(self.values) - 1) * self.options.each
        stage = 0 if done < left else 1 + (done - left) // self.options.each
        return self.values[min(stage, len(self.values) - 1)]

    def before(self, done: int) -> None:
        """Set the threshold."""
        self.done = done
        for group in self.groups:
            group["threshold"] = self.at(done)

    def penalty(self) -> Tensor | None:
        """Return l1 times the mean of |g| over all gates of the model."""
        if not self.options.l1:
            return None
        count = sum(g.numel() for g in self.gates)
        return self.options.l1 * torch.stack([g.abs().sum() for g in self.gates]).sum() / count

    def comparable(self) -> bool:
        """Say whether the last threshold is reached: more gates do better, and are not what the run is to end with."""
        return self.at(self.done) == self.values[-1]

    def finish(self) -> list[str]:
        """Say how many gates are closed; `merge` drops their components."""
        closed = sum(int((g == 0).sum()) for g in self.gates)
        return [f"{closed} of {sum(g.numel() for g in self.gates)} gates are closed"]
