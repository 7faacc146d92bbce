"""recover: what compression has left follows the uncompressed model, whole or by low-rank updates of its factors.

P  ->  P + (alpha / rank) U V        U (m, rank) starts at zero and V (rank, n) is drawn; P is a factor, or a pruned weight
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lrc.errors import UsageError
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class RecoverRecipe(RecipeOptions):
    """Train what compression left, towards the uncompressed model."""

    type: Literal["recover"] = "recover"
    updates: Literal["full", "low_rank"] = Field(
        default="full", description="Every number of a matrix moves, or the matrix moves by a product of two thin ones."
    )
    rank: int = Field(default=16, ge=1, description="Of low-rank updates; a matrix that is no larger moves in full.")
    alpha: float | None = Field(default=None, gt=0, description="The update counts alpha / rank; rank without it.")
    restart: int | None = Field(
        default=None,
        ge=1,
        description="Steps after which an update joins its matrix and a new one begins; never without.",
    )
    teacher: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_of_low_rank(self) -> Self:
        given = self.model_fields_set & {"rank", "alpha", "restart"}
        if self.updates == "full" and given:
            raise ValueError(f"`{min(given)}` is of low-rank updates; add `updates: low_rank`")
        return self

    def thin(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the matrices that move by low-rank updates."""
        if self.updates == "full":
            return []
        return [name for name, P in parameters.items() if P.ndim == 2 and min(P.shape) > self.rank]

    def moved(self, parameters: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
        """Return U (m, rank) and V (rank, n) in place of every matrix (m, n) that is larger, and all else as it is."""
        thin = set(self.thin(parameters))
        made: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, P in parameters.items():
            if name not in thin:
                made[name] = P
                continue
            made[f"{name}.U"] = nn.Parameter(P.new_zeros(len(P), self.rank))
            made[f"{name}.V"] = nn.Parameter(drawn(P, self.rank, generator))
        return made

    def held_bytes(self, trained: Mapping[str, Tensor]) -> int:
        """Return the bytes of where matrices start, and of their updates."""
        found = [trained[name] for name in self.thin(trained)]
        return sum(P.nbytes + sum(P.shape) * self.rank * P.element_size() for P in found)


def drawn(P: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return a V (rank, n) for a matrix (m, n), of variance 1 / n."""
    return (torch.randn(rank, P.shape[1], generator=generator) / math.sqrt(P.shape[1])).to(P)


@recipe(RecoverRecipe)
def recover(context: Context, options: RecoverRecipe) -> Recipe:
    """Return the recipe. Raises UsageError where no pass has compressed anything that is trained.

    Source of the updates: Hu et al. (2021), arXiv:2106.09685; of restarts: Lialin et al. (2023), arXiv:2307.05695, without its
    pruning of the optimizer's state and its ramps of the rate: the state of U and V begins anew.
    """
    if not any(fqn in context.program.maps and fqn not in context.program.adapters for fqn in context.fqns):
        raise UsageError(
            "recipe recover", expected="weights that a pass has compressed among what is trained", got="none",
            hint="Put `factorize`, `split`, `quantize` or `prune` before this pass",
        )  # fmt: skip
    return Recipe() if options.updates == "full" else LowRankUpdates(context, options)


class LowRankUpdates(Recipe):
    """Moves U and V by the gradients that P's give them, and P with them."""

    def __init__(self, context: Context, options: RecoverRecipe) -> None:
        self.options, self.seed, self.steps = options, context.seed, context.steps
        self.scale = 1.0 if options.alpha is None else options.alpha / options.rank
        self.optimizer = context.optimizer
        self.matrices = {name: context.parameters[name] for name in options.thin(context.parameters)}
        self.starts = {name: P.detach().clone() for name, P in self.matrices.items()}
        self.updates = {name: (context.moved[f"{name}.U"], context.moved[f"{name}.V"]) for name in self.matrices}
        self.full = sum(p.numel() for p in context.parameters.values())
        self.numbers = sum(p.numel() for p in context.moved.values())

    @torch.no_grad()
    def graded(self, done: int) -> None:
        """Turn the gradient G of P into those of U, G V', and of V, U' G."""
        for name, P in self.matrices.items():
            if P.grad is not None:
                U, V = self.updates[name]
                U.grad, V.grad = self.scale * P.grad @ V.mT, self.scale * U.mT @ P.grad
                P.grad = None

    @torch.no_grad()
    def after(self, done: int) -> None:
        """Let P be where its update is; begin a new one where it is time to."""
        for name, P in self.matrices.items():
            U, V = self.updates[name]
            P.copy_(torch.addmm(self.starts[name], U, V, alpha=self.scale))
        if self.options.restart and (done + 1) % self.options.restart == 0 and done + 1 < self.steps:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + 1)
            for name, P in self.matrices.items():
                U, V = self.updates[name]
                self.starts[name].copy_(P)
                U.zero_()
                V.copy_(drawn(P, self.options.rank, generator))
                self.optimizer.state.pop(U, None)
                self.optimizer.state.pop(V, None)

    def tensors(self) -> dict[str, Tensor]:
        """Return U and V."""
        return {f"{name}.{word}": t for name, pair in self.updates.items() for word, t in zip("UV", pair, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return where matrices start, once a restart may have moved that."""
        return {"starts": self.starts} if self.options.restart else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take that over."""
        for name, start in state.get("starts", {}).items():
            self.starts[name].copy_(start)

    def finish(self) -> list[str]:
        """Say how little has moved."""
        by = f"updates of rank {self.options.rank}"
        return [f"{len(self.matrices)} matrices moved by {by}: {self.numbers} numbers, not {self.full}"]
