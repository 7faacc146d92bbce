"""Fira: GaLore that also follows the part of the gradient outside its subspace."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.train.optim.adam import Params
from lrc.train.optim.base import Trained, optimizer
from lrc.train.optim.galore import GaLore, GaLoreOptions, groups_of
from lrc.train.optim.projection import up

Residual = Literal["reference", "orthogonal"]
Scaling = Literal["vector", "matrix"]
TINY = 1e-8


class Fira(GaLore):
    """GaLore plus the residual gradient, scaled as Adam scales the gradient inside the subspace.

    With N and R as in GaLore: the residual E = G - scale P R (`residual: reference`, what the published runs used) or
    E = G - P R (`orthogonal`); S = E phi, with phi = |N| / |R| of every column of R (of every row where the right side is
    projected), or of the whole matrix (`scaling: matrix`); where |S| grew by more than `norm_growth_limit` since the step
    before, S is shortened to that. The weight moves by scale P N + S. State: as GaLore, and one number.
    Raises ValueError for `proj_type: full` with `scaling: vector`: R then has no column for every column of G.
    Source: Chen et al. (2024), arXiv:2410.01623, algorithm 1 and equations 5 to 9.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        norm_growth_limit: float = 1.01,
        residual: Residual = "reference",
        scaling: Scaling = "vector",
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {"norm_growth_limit": norm_growth_limit, "residual": residual, "scaling": scaling}
        super().__init__(params, lr, **defaults, **options)
        for group in self.param_groups:
            if group["norm_growth_limit"] < 1:
                raise ValueError(f"norm_growth_limit is at least 1, got {group['norm_growth_limit']}")
            if group["proj_type"] == "full" and group["scaling"] == "vector" and group["rank"] is not None:
                raise ValueError("proj_type='full' has no vectors to scale by; set scaling='matrix', or project one side")

    def back(self, G: Tensor, R: Tensor, N: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Return scale P N + S."""
        inside = up(R, state)
        E = G - (inside.mul_(group["scale"]) if group["residual"] == "reference" else inside)
        S = self.limited(E.mul_(ratio(N, R, group["scaling"], state)), group, state)
        return super().back(G, R, N, group, state).add_(S)

    def limited(self, S: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Shorten S to the norm of the step before times the limit, where it is longer; remember its norm."""
        norm = torch.linalg.vector_norm(S)
        if "residual_norm" in state:
            limit = group["norm_growth_limit"]
            excess = torch.clamp(norm / (state["residual_norm"] + TINY), min=limit) / limit
            S = S.div_(excess)
            norm = norm / excess
        state["residual_norm"] = norm
        return S


def ratio(N: Tensor, R: Tensor, scaling: Scaling, state: Mapping[str, Any]) -> Tensor:
    """Return |N| / |R|: one number, or one for every column (left side projected) or row (right side) of the gradient."""
    dims = None if scaling == "matrix" else (0,) if "P" in state else (1,)
    norms = [torch.linalg.vector_norm(value, dim=dims, keepdim=dims is not None) for value in (N, R)]
    found: Tensor = norms[0] / norms[1].add_(TINY)
    return found


class FiraOptions(GaLoreOptions):
    """GaLore with the residual of the gradient, by norm-based scaling (Fira)."""

    type: Literal["fira"] = "fira"  # type: ignore[assignment]  # each options model has its own word
    norm_growth_limit: float = Field(default=1.01, ge=1, description="Largest growth of the residual's norm in one step.")
    residual: Residual = Field(
        default="reference", description="reference: G - scale P P'G, as published; orthogonal: without scale."
    )
    scaling: Scaling = Field(default="vector", description="One factor for every row or column of the gradient, or one in all.")

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of GaLore's state and of the residual's norm."""
        return super().state_bytes(shape, itemsize) + (itemsize if len(shape) > 1 else 0)


@optimizer(FiraOptions)
def fira(trained: Trained, options: FiraOptions) -> Fira:
    """Return Fira over what is trained: matrices projected; vectors, gates and what is ignored not."""
    given = options.arguments()
    return Fira(groups_of(trained, options, given.pop("rank")), **given)
