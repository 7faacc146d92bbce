"""svd_weight: frozen factors from the leading singular triples of the weight, and a core that is all but zero."""

from typing import Literal

import torch
from pydantic import Field

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser


class SvdWeight(InitialiserOptions):
    """The leading singular triples of the weight, which keeps them, around a core close to zero: LoRA-XS."""

    type: Literal["svd_weight"] = "svd_weight"
    core_std: float = Field(default=1e-5, ge=0, description="Standard deviation of the core's entries.")

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return that the weight has too few singular values, where it has."""
        if rank > min(shape):
            return f"`init: {self.type}` has {min(shape)} terms at most, and rank {rank} was asked for"
        return None


@initialiser(SvdWeight)
def svd_weight(start: Start, options: SvdWeight) -> Initial:
    """Return B = U_r, A = S_r V_rᵀ of W = U S Vᵀ, and a core R ~ N(0, core_std²); the base stays.

    Source: Bałazy et al. (2024), arXiv:2405.17604; the singular values go to A, as in the authors' code.
    """
    U, S, Vh = torch.linalg.svd(start.weight(), full_matrices=False)
    core = torch.empty(start.rank, start.rank).normal_(0.0, options.core_std, generator=start.generator)
    return Initial(U[:, : start.rank], S[: start.rank, None] * Vh[: start.rank], core=core)
