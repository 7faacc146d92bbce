"""A diagonal between two factors that training drives to exact zeros."""

from typing import ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Structure
from lrc.maps.leaves import Diagonal


class Gate(Diagonal):
    """y = gate * x, gate (rank,), kept in float32 whatever the model's dtype: its steps are too small for 16 bits.

    Source: SoRA (2023), arXiv:2311.11696.
    """

    word: ClassVar[str] = "gate"

    def __init__(self, diagonal: Tensor, bias: Tensor | None = None, spatial: int = 0) -> None:
        super().__init__(diagonal if diagonal.dtype == torch.float64 else diagonal.float(), bias, spatial)

    def entries(self, x: Tensor) -> Tensor:
        """Return the gate in the dtype of x."""
        return self.diagonal.type_as(x)

    @property
    def open(self) -> Tensor:
        """The places of the entries that are not exactly zero, ascending, int64."""
        return self.diagonal.detach().nonzero().flatten()

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Replace every entry v by sign(v) max(|v| - threshold, 0), in place: the proximal step of threshold * sum|v|."""
        self.diagonal.copy_(self.diagonal.sign() * (self.diagonal.abs() - threshold).clamp_min(0))

    @classmethod
    def restored(cls, structure: Structure) -> "Gate":
        """Return an uninitialised map."""
        size = structure["size"]
        bias = torch.empty(size) if structure["bias"] else None
        return cls(torch.empty(size, dtype=torch.float32), bias, int(structure.get("spatial", 0)))
