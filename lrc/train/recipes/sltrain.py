"""sltrain: pretraining of products and sparse rests whose support is drawn once; no dense weight is stored or kept."""

from collections.abc import Mapping
from typing import Literal

from lrc.errors import UsageError
from lrc.maps import SparseLowRank
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class SltrainRecipe(RecipeOptions):
    """Train low-rank plus sparse weights in all their parts, by a backward pass that makes every weight anew."""

    type: Literal["sltrain"] = "sltrain"


@recipe(SltrainRecipe)
def sltrain(context: Context, options: SltrainRecipe) -> Recipe:
    """Return the recipe. Raises UsageError without such weights, and where a part of one is not trained.

    Source: Han et al. (2024), arXiv:2406.02214, algorithm 1. The parts, their start and scale are those of
    `split` with `solver: {type: sltrain, start: random}`; updates in the backward pass and states of 8 bits are `per_layer`
    and `optimizer` of the training.
    """
    made = {fqn: context.program.maps.get(fqn) for fqn in context.fqns}
    layers = {fqn: m for fqn, m in made.items() if isinstance(m, SparseLowRank)}
    if not layers:
        raise UsageError(
            "recipe sltrain", expected="low-rank plus sparse weights", got="none",
            hint="Put `split` with `solver: {type: sltrain, start: random}` before this pass",
        )  # fmt: skip
    trained = {id(p) for p in context.parameters.values()}
    for fqn, layer in layers.items():
        parts = layer.parts()
        if parts is None or any(id(p) not in trained for p in (parts[0], parts[1], parts[3].values)):
            raise UsageError(
                "recipe sltrain", message=f"{fqn}: a part of {layer!r} is not trained", hint="Let `split` be its last pass"
            )
    return Supports(layers)


class Supports(Recipe):
    """Watches over the layers; their maps do the work."""

    def __init__(self, layers: Mapping[str, SparseLowRank]) -> None:
        self.layers = dict(layers)

    def finish(self) -> list[str]:
        """Say what was trained in place of how much."""
        numbers = sum(p.numel() for layer in self.layers.values() for p in layer.parameters())
        dense = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        largest = max(layer.out_features * layer.in_features for layer in self.layers.values())
        return [
            f"{len(self.layers)} weights of {dense} numbers are trained as {numbers}; a step makes {largest} of them at most"
        ]
