"""A product of rank r in r(m + n - r) numbers: r of its rows (or columns) as they are, the others in terms of them."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias, gathered

fx.wrap("gathered")  # one operation in the text of a program
Side = Literal["out", "in"]


class Pivoted(InParts):
    """The pivoted form of a rank-r matrix.

    side "out": P (rank, in_features) are pivot rows, Z (out_features - rank, rank) gives the others:
    y = cat([P x, Z (P x)])[..., index] + bias.
    side "in": P (out_features, rank) are pivot columns, Z (in_features - rank, rank): with x' = x[..., index],
    y = P (x'[:rank] + Zᵀ x'[rank:]) + bias.
    index: the order of the outputs (or inputs), 4 bytes each; None where a neighbour has absorbed it.
    Source: Cheng, Gimbutas, Martinsson & Rokhlin (2005), doi:10.1137/030602678; as a layer: PIFA (2025), arXiv:2501.19090.
    """

    word: ClassVar[str] = "pivoted"
    index: Tensor | None

    def __init__(self, P: Tensor, Z: Tensor, index: Tensor | None, side: Side = "out", bias: Tensor | None = None) -> None:
        super().__init__()
        if side not in ("out", "in"):
            raise ValueError(f"the side of the pivots is `out` or `in`, not {side!r}")
        self.P = as_parameter(P)
        self.Z = as_parameter(Z)
        self.side: Side = side
        self.register_buffer("index", None if index is None else index.to(torch.int32))
        rows = Z.shape[0] + Z.shape[1]
        self.out_features, self.in_features = (rows, P.shape[1]) if side == "out" else (P.shape[0], rows)
        self.set_bias(bias)

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return self.Z.shape[1]

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        if self.side == "in":
            if self.index is not None:
                x = gathered(x, -1, self.index)
            h = x[..., : self.rank] + F.linear(x[..., self.rank :], self.Z.T)
            return F.linear(h, self.P, self.bias)
        h = F.linear(x, self.P)
        y = torch.cat([h, F.linear(h, self.Z)], -1)
        if self.index is not None:
            y = gathered(y, -1, self.index)
        return y if self.bias is None else y + self.bias

    def exact(self) -> Affine:
        """Return the product in its own order, and the bias, in float64."""
        P, Z = self.P.detach().double(), self.Z.detach().double()
        weight = torch.cat([P, Z @ P]) if self.side == "out" else torch.cat([P, P @ Z.T], 1)
        if self.index is not None:
            index = self.index.long()
            weight = weight[index] if self.side == "out" else weight[:, index.argsort()]
        return Affine(weight, exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return r(m + n - r) numbers, the index in bytes alone, and 2 r(m + n - r) FLOPs a token."""
        size = self.P.numel() + self.Z.numel()
        index = 0 if self.index is None else self.index.numel() * self.index.element_size()
        added = tokens * self.rank if self.side == "in" else 0
        return Cost(size, size * self.P.element_size() + index, 2 * tokens * size + added) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes, the side, and whether there is an index."""
        return {
            "map": self.word, "shape": [self.out_features, self.in_features], "rank": self.rank, "side": self.side,
            "index": self.index is not None, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def restored(cls, structure: Structure) -> "Pivoted":
        """Return an uninitialised map."""
        (out_features, in_features), rank, side = structure["shape"], structure["rank"], structure["side"]
        pivots, rows = (in_features, out_features) if side == "out" else (out_features, in_features)
        P = torch.empty(rank, pivots) if side == "out" else torch.empty(pivots, rank)
        index = torch.empty(rows, dtype=torch.int32) if structure["index"] else None
        bias = torch.empty(out_features) if structure["bias"] else None
        return cls(P, torch.empty(rows - rank, rank), index, side, bias)

    def __repr__(self) -> str:
        return f"Pivoted[{self.out_features},{self.rank},{self.in_features}]{self.mark()}"
