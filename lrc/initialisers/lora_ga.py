"""lora_ga: singular vectors of the gradient, so that the first step follows that of full training."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser, lowrank_svd
from lrc.initialisers.kaiming import Kaiming, kaiming

NO_GRADIENT = "no gradient on the calibration data: "
Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]


class GradientStart(InitialiserOptions):
    """What starts at the singular vectors of a gradient have in common."""

    direction: Direction = Field(
        default="ArB2r",
        description="Which of the 2r leading singular vectors A and B take: A the first r and B the second (ArB2r), the other "
        "way round, alternating, or at random.",
    )
    niter: int = Field(default=4, ge=0, description="Power iterations of the randomised decomposition.")
    gradients: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return why a weight has no 2r singular vectors."""
        if 2 * rank > min(shape):
            return f"`init: {self.type}` takes {2 * rank} singular vectors, and the gradient has {min(shape)}"
        return super().obstacle(kind, shape, rank)


class LoraGa(GradientStart):
    """The paper's: both factors orthogonal, equally scaled."""

    type: Literal["lora_ga"] = "lora_ga"
    scale: Literal["stable", "gd", "unit", "weight_svd"] = Field(
        default="stable", description="out^(1/4)/sqrt(gamma) (stable), 1/s (gd), 1 (unit), or the weight's own singular values."
    )
    gamma: float = Field(default=16.0, gt=0, strict=False, description="Of `scale: stable`: the larger, the smaller the start.")
    norm_clip: bool = Field(default=False, description="Keep every entry of the offset within the largest entry of the weight.")


@initialiser(LoraGa)
def lora_ga(start: Start, options: LoraGa) -> Initial:
    """Return rows of V and columns of U of the gradient G = U S Vᵀ, scaled, and the base W - s B A.

    The first step of gradient descent on A, B then moves W along the best rank-2r approximation of G (for `scale: unit`
    exactly so). float32. Source: Wang, Yu & Li (2024), arXiv:2407.05000, algorithm 1 and theorem 3.2.
    """
    W, G = start.weight(), gradient_of(start)
    if G is None:
        return without_gradient(start)
    rank, s = start.rank, start.scaling
    U, _, Vh = lowrank_svd(G, min(4 * rank, *G.shape), options.niter, start.generator.initial_seed())
    of_A, of_B = places(options.direction, rank, start.generator, disjoint=True)
    factor = {
        "stable": G.shape[0] ** 0.25 / math.sqrt(options.gamma), "gd": 1 / s, "unit": 1.0,
        "weight_svd": float((torch.linalg.svdvals(W)[:rank] / s).sqrt().mean()) if options.scale == "weight_svd" else 1.0,
    }[options.scale]  # fmt: skip
    A, B = factor * Vh[of_A], factor * U[:, of_B]
    if options.norm_clip:
        ratio = float(W.abs().max() / (s * B @ A).abs().max())
        if ratio < 1:
            A, B = A * math.sqrt(ratio), B * math.sqrt(ratio)
    return Initial(B, A, base=W - s * (B @ A), subtracted=True)


def gradient_of(start: Start) -> Tensor | None:
    """Return the gradient in float32; None where the loss does not depend on the weight (an expert that no token went to)."""
    G = start.gradient
    assert G is not None, "the pass measures what the options ask for"
    return G.float() if bool(G.any()) else None


def without_gradient(start: Start) -> Initial:
    """Return the start of plain LoRA, with a note: there is no gradient to follow."""
    return replace(kaiming(start, Kaiming()), notes=(NO_GRADIENT + "it starts as `kaiming` has it, and its base stays",))


def places(direction: Direction, rank: int, generator: torch.Generator, *, disjoint: bool) -> tuple[Tensor, Tensor]:
    """Return which singular vectors A and B take, (rank,) each, out of the first 2 rank."""
    every = torch.arange(2 * rank)
    if direction == "ArB2r":
        return every[:rank], every[rank:]
    if direction == "A2rBr":
        return every[rank:], every[:rank]
    if direction == "ArBr":
        return every[1::2], every[0::2]
    drawn = torch.randperm(2 * rank, generator=generator)
    return drawn[:rank], drawn[rank:] if disjoint else drawn[:rank]
