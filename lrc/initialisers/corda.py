"""corda: singular triples of the weight times the covariance of its inputs, which the base gives up."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers.base import Initial, InitialiserOptions, Observer, Start, initialiser, subtracted

INVERTED = 0.05  # how far C C⁻¹ may be from the identity, in the Frobenius norm
DAMPING = 0.01


class Covariance:
    """The mean over batches of Xᵀ X, X divided by the size of its largest entry, float32."""

    done = False

    def __init__(self, features: int) -> None:
        self._total = torch.zeros(features, features)
        self._count = 0

    def see(self, rows: Tensor) -> None:
        """Add the rows of one batch, (rows, features)."""
        X = rows.float() / rows.float().max().abs().clamp(min=torch.finfo(torch.float32).tiny)
        self._total = self._total.to(X.device) + X.T @ X
        self._count += 1

    def found(self) -> Tensor:
        """Return the mean, (features, features)."""
        return self._total / max(self._count, 1)


class Corda(InitialiserOptions):
    """Triples of the weight seen through the covariance of its inputs; the frozen weight is what remains."""

    type: Literal["corda"] = "corda"
    mode: Literal["ipm", "kpm"] = Field(
        default="ipm",
        description="Which triples are trained: the largest (ipm: learn the calibrated task) or the smallest (kpm: keep what "
        "the calibration data shows).",
    )
    changes_base: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def observer(self, features: int, rank: int) -> Observer:
        """Return what adds up the covariance."""
        return Covariance(features)


@initialiser(Corda)
def corda(start: Start, options: Corda) -> Initial:
    """Return B = U sqrt(S / s), A = sqrt(S / s) Vᵀ C⁻¹ for W C = U S Vᵀ, of r triples, and the base W - s B A.

    C is damped by 0.01 of its mean diagonal, doubled until C C⁻¹ is within 0.05 of the identity. float32. A batch counts as one
    sample. Source: Yang et al. (2024), arXiv:2406.05223, equations 2 to 6, with the normalisation of PEFT.
    """
    W, C = start.weight(), start.observed
    eye = torch.eye(len(C), device=C.device)
    damping = DAMPING
    while True:
        damped = C + damping * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if float(torch.linalg.matrix_norm(damped @ inverse - eye)) < INVERTED:
            break
        damping *= 2
        if damping > 1e6:
            raise ValueError("the covariance of the inputs cannot be inverted: are they all zero on the calibration data?")
    U, S, Vh = torch.linalg.svd(W @ damped.to(W.dtype), full_matrices=False)
    chosen = slice(0, start.rank) if options.mode == "ipm" else slice(len(S) - start.rank, len(S))
    root = (S[chosen] / start.scaling).sqrt()
    A = root[:, None] * (Vh @ inverse.to(W.dtype))[chosen]
    notes = () if damping == DAMPING else (f"the covariance was damped by {damping:g} of its mean diagonal to be inverted",)
    made = subtracted(start, W, U[:, chosen] * root, A)
    return Initial(made.B, made.A, base=made.base, subtracted=True, notes=notes)
