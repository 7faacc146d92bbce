"""lora_sb: the factors of the first update of full training, with a core between them."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser, lowrank_svd
from lrc.initialisers.lora_ga import NO_GRADIENT, gradient_of

OVERSAMPLED = 10  # the flat spectrum of a matrix of signs wants more columns than the rank


class LoraSb(InitialiserOptions):
    """The leading singular triples of the first update; the start is that update, not the base."""

    type: Literal["lora_sb"] = "lora_sb"
    step: float = Field(
        default=1e-4, gt=0, strict=False, description="The learning rate of the first step that is approximated (with a "
        "warm-up, that of its first step)."
    )  # fmt: skip
    niter: int = Field(default=10, ge=0, description="Power iterations of the randomised decomposition.")
    gradients: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return why a rank has no such start."""
        if rank > min(shape):
            return f"`init: lora_sb` has {min(shape)} terms at most, and rank {rank} was asked for"
        return super().obstacle(kind, shape, rank)


@initialiser(LoraSb)
def lora_sb(start: Start, options: LoraSb) -> Initial:
    """Return B = U_r, core = diag(S_r) / s, A = V_rᵀ for D = -step sign(G) ~ U S Vᵀ: s B core A is the best part of D.

    D is the first step of AdamW on the weight, whose gradient is G. BᵀB = A Aᵀ = I, and the base is not changed. float32.
    Source: Ponkshe et al. (2024), arXiv:2411.19557, equations 8 to 10.
    """
    G = gradient_of(start)
    D = torch.zeros(start.shape) if G is None else -options.step * G.sign()
    q = min(start.rank + OVERSAMPLED, *D.shape)
    U, S, Vh = lowrank_svd(D, q, options.niter, start.generator.initial_seed())
    r = start.rank
    notes = () if G is not None else (NO_GRADIENT + "the core starts at zero",)
    return Initial(U[:, :r].contiguous(), Vh[:r].contiguous(), core=torch.diag(S[:r]) / start.scaling, notes=notes)
