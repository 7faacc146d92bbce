"""A matrix with a fixed support: the numbers that are not zero, and where they stand."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.formats import BlockSupport, Support, support_of
from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias
from lrc.maps.kernels import by_kernel
from lrc.maps.recompute import Packed, packed_linear

ENTRIES = BlockSupport()


class Sparse(InParts):
    """y = weight x + bias, the weight (out_features, in_features) zero outside of a fixed support.

    values: (count,), the numbers of the support; they may be trained. support: packed by its `kind` (`lrc.formats.supports`):
    single entries, n of m inputs, or blocks. The weight is spread out where it is applied, stored sparse and run dense; but on
    a CPU, outside of compilers, fewer than one single entry in 32 are multiplied as a CSR matrix, which is faster there.
    """

    word: ClassVar[str] = "sparse"
    support: Tensor

    def __init__(
        self, values: Tensor, support: Tensor, shape: tuple[int, int], bias: Tensor | None = None, kind: Support = ENTRIES
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.kind = kind
        self.values = as_parameter(values)
        self.register_buffer("support", support)
        self.set_bias(bias)

    @classmethod
    def of(cls, weight: Tensor, support: Tensor, bias: Tensor | None = None, pattern: str = "all") -> "Sparse":
        """Return the map of the entries of `weight` where `support`, bool of the same shape, is true.

        pattern: how the support is packed, `all`, `2:4` or `16x16`. Raises ValueError for a support of another pattern.
        """
        kind = support_of(pattern)
        packed, count = kind.encode(support)
        values = kind.gather(weight.detach() * support, packed, count)
        return cls(values, packed, (weight.shape[0], weight.shape[1]), bias, kind)

    @property
    def count(self) -> int:
        """How many numbers are stored."""
        return self.values.shape[0]

    def spread(self, values: Tensor | None = None) -> Tensor:
        """Return the weight (out_features, in_features), of other values where given; gradients flow to them."""
        return self.kind.spread(self.values if values is None else values, self.support, self.shape)

    @property
    def runs(self) -> str:
        """How it is stored and run, for a plan."""
        if self.kind.by_position(self.support):
            return "stored sparse; run as CSR on a CPU, dense where it is compiled or exported"
        return f"stored sparse ({self.kind.pattern}), run dense"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        found = by_kernel(self, x)
        if found is not None:
            return found
        product = self._csr_product if self._pays_as_csr(x) else None
        packed = Packed((self.support,), self.weight_of, self.gathered_of, product)
        return packed_linear(x, self.bias, packed, self.values)

    def weight_of(self, values: Tensor | None, stored: Sequence[Tensor]) -> Tensor:
        """Return the weight of values (count,) on a packed support."""
        assert values is not None, "a sparse map has values"
        return self.kind.spread(values, stored[0], self.shape)

    def gathered_of(self, gradient: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """Return the numbers of a matrix on a packed support."""
        return self.kind.gather(gradient, stored[0], self.count)

    def gathered(self, gradient: Tensor) -> Tensor:
        """Return the numbers of a matrix (out_features, in_features) on the support, in the order of the values."""
        return self.gathered_of(gradient, (self.support,))

    def _pays_as_csr(self, x: Tensor) -> bool:
        """Say whether the product of a CSR matrix is faster and can be had: on a CPU, for few single entries."""
        return (
            type(x) is Tensor
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and self.kind.by_position(self.support)
            and x.device.type == "cpu"
            and x.dtype == self.values.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
        )

    def _csr_product(self, x: Tensor, values: Tensor | None) -> Tensor:
        """Return weight x; the rows and columns are read off the positions, which costs little beside the product."""
        assert values is not None, "a sparse map has values"
        rows, columns = self.shape
        starts = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
        crow = torch.searchsorted(self.support, starts, out_int32=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR matrices a beta
            matrix = torch.sparse_csr_tensor(crow, self.support % columns, values.detach(), self.shape, check_invariants=False)
            return (matrix @ x.detach().reshape(-1, columns).T).T.reshape(*x.shape[:-1], rows)

    def matrix(self) -> Tensor:
        """Return the weight."""
        return self.spread()

    def exact(self) -> Affine:
        """Return the weight and the bias in float64."""
        return Affine(self.spread().detach().double(), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return the stored numbers, the support in bytes alone, and the FLOPs of the dense product, which runs everywhere."""
        index = self.support.numel() * self.support.element_size()
        flops = 2 * tokens * self.out_features * self.in_features
        return Cost(self.count, self.count * self.values.element_size() + index, flops) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes and the pattern."""
        sizes = {"shape": list(self.shape), "count": self.count, "pattern": self.kind.pattern}
        return {"map": self.word, **sizes, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Sparse":
        """Return an uninitialised map."""
        (rows, columns), count = structure["shape"], structure["count"]
        kind = support_of(structure.get("pattern", "all"))
        bias = torch.empty(rows) if structure["bias"] else None
        return cls(torch.empty(count), kind.empty(count, (rows, columns)), (rows, columns), bias, kind)

    def __repr__(self) -> str:
        share = self.count / (self.out_features * self.in_features)
        pattern = "" if self.kind == ENTRIES else f",{self.kind.pattern}"
        return f"Sparse[{self.out_features},{self.in_features},{share:.1%}{pattern}]{self.mark()}"
