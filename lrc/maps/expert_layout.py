"""How a tensor of three dimensions acts as matrices: one an expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrc.maps.base import LinearMap
from lrc.maps.experts import Experts
from lrc.maps.layouts import Form, Rows


@dataclass(frozen=True)
class Banks(Rows):
    """Experts: one matrix each, a block of rows that reads the rows of its expert alone.

    transposed: stored as (experts, in_features, out_features).
    """

    experts: int = 1
    kind: ClassVar[str] = "experts"
    forms: ClassVar[tuple[Form, ...]] = ("two_factor",)

    @property
    def groups(self) -> int:
        """The experts."""
        return self.experts

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (experts * out_features of one, in_features)."""
        count, rows, columns = stored
        return (count * columns, rows) if self.transposed else (count * rows, columns)

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return all matrices as one map."""
        return Experts([stored.transpose(1, 2) if self.transposed else stored], transposed=self.transposed)

    def dense(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return all matrices as one map."""
        _no_bias(bias)
        return Experts([weight.reshape(self.experts, -1, weight.shape[1])], transposed=self.transposed)

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return two factors an expert. A: (rank, experts, in_features)."""
        _no_bias(bias)
        left, right = B.reshape(self.experts, -1, B.shape[1]), A.movedim(0, 1)
        return Experts([left.contiguous(), right.contiguous()], transposed=self.transposed)

    def owners(self, value: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Return the expert of every row that a site reads, (rows,); context: see `Experts.forward`."""
        if "ids" in context:
            return context["ids"].reshape(-1)
        if "offs" in context:
            return torch.searchsorted(context["offs"].long(), torch.arange(len(value), device=value.device), right=True)
        return torch.arange(self.experts, device=value.device).repeat_interleave(value.shape[1])

    def obstacle(self) -> str | None:
        """Return that no single product stands for several matrices."""
        return f"{self.experts} experts, each of which reads rows of its own"

    def obstacle_in_groups(self, shape: tuple[int, int]) -> str | None:
        """Return None: every expert has a product of its own."""
        return None


def _no_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise ValueError("experts have no bias: choose `center: false`")
