"""AdamW on pairs of factors, each gradient scaled by the other factor: steps that do not depend on how B A is balanced."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.train.optim.adam import Adam, Params
from lrc.train.optim.base import OptimizerOptions, Trained, optimizer

SMALL = 1e-6  # a Gram matrix of no greater Frobenius norm is taken as the identity


class RiemannianAdamW(Adam):
    """AdamW after the scaling gA <- (B'B + reg I)^-1 gA and gB <- gB (A A' + reg I)^-1 of every pair.

    pairs: factors (A, B), A (rank, in_features) and B (out_features, rank). Both use the other's value from before the step;
    a Gram matrix with a Frobenius norm of at most 1e-6 counts as I. params: all that is trained, the pairs among it; by
    default the pairs alone. Parameters outside pairs get plain AdamW. Raises ValueError for shapes that are no pair, and
    torch.linalg.LinAlgError for a singular Gram matrix at reg = 0 (use reg >= 1e-6 where B starts partly at zero).
    Source: Zhang & Pilanci (2024), arXiv:2402.02347, as used by Xu et al. (2024), arXiv:2403.19456.
    """

    def __init__(
        self,
        params: Params | None = None,
        lr: float = 1e-3,
        *,
        pairs: Iterable[tuple[Tensor, Tensor]],
        reg: float = 0.0,
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        self.pairs = tuple(pairs)
        for A, B in self.pairs:
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(f"a pair is A (rank, in) and B (out, rank), got {tuple(A.shape)} and {tuple(B.shape)}")
        if reg < 0:
            raise ValueError(f"reg is not negative, got {reg}")
        self.reg = reg
        self._scaled: dict[Tensor, Tensor] = {}
        given = [p for pair in self.pairs for p in pair] if params is None else params
        super().__init__(given, lr, eps=eps, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        """Scale the gradients of all pairs by the factors as they are, then take AdamW's step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for A, B in self.pairs:
            if A.grad is not None:
                self._scaled[A] = solve(B.T @ B, super().gradient(A), self.reg)
            if B.grad is not None:
                self._scaled[B] = solve(A @ A.T, super().gradient(B).T, self.reg).T
        super().step()
        self._scaled.clear()
        return loss

    def gradient(self, p: Tensor) -> Tensor:
        """Return the scaled gradient."""
        return self._scaled.get(p, super().gradient(p))


def solve(gram: Tensor, right: Tensor, reg: float) -> Tensor:
    """Return (gram + reg I)^-1 right; `right` itself where gram is all but zero."""
    gram = gram.to(right.dtype)
    if torch.linalg.matrix_norm(gram) <= SMALL:
        return right
    gram.diagonal().add_(reg)
    found: Tensor = torch.linalg.solve(gram, right)
    return found


class RiemannianOptions(OptimizerOptions):
    """AdamW whose gradients of B and A are scaled by the other factor."""

    type: Literal["riemannian_adamw"] = "riemannian_adamw"
    lr: float = Field(default=1e-4, ge=0, description="Learning rate.")
    reg: float = Field(default=1e-6, ge=0, description="Added to the diagonals of the Gram matrices.")


@optimizer(RiemannianOptions)
def riemannian_adamw(trained: Trained, options: RiemannianOptions) -> RiemannianAdamW:
    """Return the optimiser over what is trained; its pairs are the factors A, B of one site."""
    pairs = [(trained.parameters[a], trained.parameters[b]) for a, b in trained.pairs]
    return RiemannianAdamW(trained.groups(), pairs=pairs, **options.arguments())
