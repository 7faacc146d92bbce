"""A matrix made of a few short rows, each used many times: codes say which stands where."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.formats import pack, packed_bytes, unpack
from lrc.maps.base import Affine, Cost, Structure, exact_bias
from lrc.maps.conv import Geometry
from lrc.maps.dtypes import OwnDtypes, stored_dtype
from lrc.maps.recompute import Packed, packed_linear


def code_bits(codewords: int) -> int:
    """Return how many bits a code of one out of `codewords` takes."""
    return max(1, math.ceil(math.log2(codewords)))


class Codebook(OwnDtypes):
    """y = weight x + bias, weight (out_features, in_features) = codebook[codes], row by row in pieces of d numbers.

    codebook: (k, d); codes: packed, ceil(log2(k)) bits for each of out_features * in_features / d pieces. A codebook in the
    map's dtype is a parameter, and its gradient at a codeword is the sum over the pieces that use it; one in another dtype
    (float16) is a buffer: it is not trained and no cast of the model changes it. spatial: dimensions after the features, 2
    for images, which are convolved 1 x 1. The weight is looked up where it is applied: stored in codes, run dense.
    Source: Stock et al. (2020), arXiv:1907.05686; of low-rank pieces: LR2VQ (2022), arXiv:2211.11397.
    """

    word: ClassVar[str] = "codebook"
    codes: Tensor
    codebook: Tensor

    def __init__(
        self,
        codes: Tensor,
        codebook: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        spatial: int = 0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        if self.in_features % codebook.shape[1]:
            raise ValueError(f"rows of {self.in_features} numbers are not made of pieces of {codebook.shape[1]}")
        self.dims = spatial
        self.k, self.d = codebook.shape
        self.register_buffer("codes", codes)
        self._dtype = dtype or codebook.dtype
        self.store("codebook", codebook)
        self.set_bias(bias)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        codebook: Tensor,
        out_features: int,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        spatial: int = 0,
    ) -> "Codebook":
        """Return the map of whole-numbered codes (pieces,), those of a row one after the other."""
        packed = pack(codes, code_bits(len(codebook)))
        in_features = len(codes) // out_features * codebook.shape[1]
        return cls(packed, codebook, (out_features, in_features), dtype, bias, spatial)

    @property
    def spatial(self) -> int:
        """The dimensions after the features."""
        return self.dims

    @property
    def pieces(self) -> int:
        """How many codes there are."""
        return self.out_features * self.in_features // self.d

    @property
    def packed_numbers(self) -> int:
        """The codes, one number each."""
        return self.pieces

    def places(self, codes: Tensor | None = None) -> Tensor:
        """Return the codes (pieces,), int32; of other packed ones where given."""
        return unpack(self.codes if codes is None else codes, code_bits(self.k), self.pieces)

    def matrix(self) -> Tensor:
        """Return the weight (out_features, in_features) in the map's dtype; gradients flow to the codebook."""
        return self.weight_of(self.computed("codebook"), (self.codes,))

    def weight_of(self, values: Tensor | None, stored: Sequence[Tensor]) -> Tensor:
        """Return the weight of a trained codebook (k, d) and packed codes; one that is not trained comes after the codes."""
        book = stored[1].to(self._dtype) if values is None else values
        return book.index_select(0, self.places(stored[0])).reshape(self.out_features, self.in_features)

    def gathered(self, gradient: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """Return the sum of a gradient (out_features, in_features) over the pieces of every codeword, (k, d)."""
        return gradient.new_zeros(self.k, self.d).index_add(0, self.places(stored[0]), gradient.reshape(-1, self.d))

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features), or to (batch, in_features, *sizes)."""
        if self.dims:
            kernel = self.matrix().reshape(self.out_features, self.in_features, *(1,) * self.dims)
            return Geometry.unit(self.dims)(x, kernel, self.bias)
        trained = None if "codebook" in self.apart else self.codebook
        stored = (self.codes,) if trained is not None else (self.codes, self.codebook)
        return packed_linear(x, self.bias, Packed(stored, self.weight_of, self.gathered), trained)

    def exact(self) -> Affine:
        """Return the weight and the bias in float64."""
        found = self.codebook.detach().double().index_select(0, self.places())
        return Affine(found.reshape(self.out_features, self.in_features), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return k d numbers and one a code, the bytes of both, and the FLOPs of the dense product that is run."""
        book, flops = self.codebook, 2 * tokens * self.out_features * self.in_features
        stored = self.codes.numel() * self.codes.element_size() + book.numel() * book.element_size()
        return Cost(book.numel() + self.pieces, stored, flops) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes, and the dtype of the codebook where it is its own."""
        return {
            "map": self.word, "shape": [self.out_features, self.in_features], "codebook": [self.k, self.d],
            "stored": self.own_dtype("codebook"), "spatial": self.dims, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def restored(cls, structure: Structure) -> "Codebook":
        """Return an uninitialised map."""
        (rows, columns), (k, d) = structure["shape"], structure["codebook"]
        codes = torch.empty(packed_bytes(rows * columns // d, code_bits(k)), dtype=torch.uint8)
        book = torch.empty(k, d, dtype=stored_dtype(structure["stored"]))
        bias = torch.empty(rows) if structure["bias"] else None
        return cls(codes, book, (rows, columns), torch.get_default_dtype(), bias, int(structure["spatial"]))

    def __repr__(self) -> str:
        return f"Codebook[{self.out_features},{self.in_features}; {self.k}x{self.d}]{self.mark()}"
