"""The subspace of a gradient that GaLore and Fira keep their moments in.

For a gradient G (m, n): `left` keeps P (m, rank), the leading left singular vectors, and R = P' G (rank, n); `right` keeps
Q (rank, n), the leading right ones, and R = G Q' (m, rank); `full` keeps both, and R = P' G Q' (rank, rank).
"""

from typing import Any, Literal

import torch
from torch import Tensor

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Side = Literal["left", "right", "full"]
SIDES: tuple[ProjType, ...] = ("std", "reverse_std", "left", "right", "full")


def side_of(m: int, n: int, proj_type: ProjType) -> Side:
    """Return the side that is projected: with `std` that of the shorter dimension, with `reverse_std` of the longer one."""
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def basis(G: Tensor, rank: int, side: Side) -> dict[str, Tensor]:
    """Return the leading singular vectors of G as {P, Q}, in the dtype of G; computed in float32 or better.

    A rank above min(m, n) gives all min(m, n) of them.
    """
    U, _, Vh = torch.linalg.svd(G.float() if G.dtype != torch.float64 else G, full_matrices=False)
    found = {}
    if side != "right":
        found["P"] = U[:, :rank].to(G.dtype, copy=True)
    if side != "left":
        found["Q"] = Vh[:rank].to(G.dtype, copy=True)
    return found


def down(G: Tensor, state: dict[str, Any]) -> Tensor:
    """Return R, the gradient in the subspace."""
    R = state["P"].T @ G if "P" in state else G
    return R @ state["Q"].T if "Q" in state else R


def up(R: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the (m, n) matrix that R stands for."""
    G = state["P"] @ R if "P" in state else R
    return G @ state["Q"] if "Q" in state else G
