"""pissa: the leading singular triples of the weight, which the base gives up."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser, lowrank_svd, subtracted


class Pissa(InitialiserOptions):
    """The leading singular triples of the weight; the frozen weight is what remains."""

    type: Literal["pissa"] = "pissa"
    niter: int | None = Field(
        default=None,
        ge=1,
        description="Power iterations of a randomised decomposition (PEFT's `pissa_niter_K`); exact without.",
    )
    changes_base: ClassVar[bool] = True


@initialiser(Pissa)
def pissa(start: Start, options: Pissa) -> Initial:
    """Return B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_rᵀ for W = U S Vᵀ, and the base W - s B A.

    Decomposed in the dtype of `start.weight()`. Source: Meng, Wang & Zhang (2024), arXiv:2404.02948, equations 2 to 4.
    """
    W = start.weight()
    if options.niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = lowrank_svd(W, start.rank, options.niter, start.generator.initial_seed())
    root = (S[: start.rank] / start.scaling).sqrt()
    return subtracted(start, W, U[:, : start.rank] * root, root[:, None] * Vh[: start.rank])
