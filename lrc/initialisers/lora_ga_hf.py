"""lora_ga_hf: PEFT's variant of LoRA-GA."""

import math
from typing import Literal

import torch
from pydantic import Field

from lrc.initialisers.base import Initial, Start, initialiser, lowrank_svd
from lrc.initialisers.lora_ga import GradientStart, gradient_of, places, without_gradient


class LoraGaHf(GradientStart):
    """PEFT's: B carries the singular values of the gradient."""

    type: Literal["lora_ga_hf"] = "lora_ga_hf"
    scale: Literal["stable", "gd", "unit", "weight_svd"] = Field(default="stable", description="As for `lora_ga`; of B alone.")
    gamma: float = Field(default=16.0, gt=0, strict=False, description="Of `scale: stable`: the larger, the smaller the start.")


@initialiser(LoraGaHf)
def lora_ga_hf(start: Start, options: LoraGaHf) -> Initial:
    """Return A = rows of V, B = columns of U times their singular values, B scaled, and the base W - s B A.

    With `direction: random` A and B take the same vectors. float32. Source: Wang, Yu & Li (2024), arXiv:2407.05000, as PEFT
    0.19 has it.
    """
    W, G = start.weight(), gradient_of(start)
    if G is None:
        return without_gradient(start)
    rank, s = start.rank, start.scaling
    U, S, Vh = lowrank_svd(G, min(4 * rank, *G.shape), options.niter, start.generator.initial_seed())
    of_A, of_B = places(options.direction, rank, start.generator, disjoint=False)
    A, B = Vh[of_A], U[:, of_B] * S[of_B]
    if options.scale == "stable":
        B = B * (G.shape[0] ** 0.25 / math.sqrt(options.gamma))
    elif options.scale == "gd":
        A, B = A / s, B / s
    elif options.scale == "weight_svd":
        B = B * (torch.linalg.svdvals(W)[0] / S[of_B][0])
    return Initial(B, A, base=W - s * (B @ A), subtracted=True)
