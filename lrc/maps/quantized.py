"""A matrix in few bits: packed codes and their scales, decoded where it is applied."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.formats import Encoded, NumberFormat, format_of
from lrc.kernels import quantized_linear, runs_quantized
from lrc.maps.base import Affine, Cost, Structure, exact_bias
from lrc.maps.dtypes import OwnDtypes
from lrc.maps.kernels import by_kernel
from lrc.maps.recompute import Packed, packed_linear


class Quantized(OwnDtypes):
    """y = weight x + bias, the weight (out_features, in_features) stored in a number format.

    The packed tensors are buffers of the map, and not trained; gradients flow to x and to the bias. A cast of the model
    changes the dtype that is computed in, never the packed tensors.
    """

    word: ClassVar[str] = "quantized"

    def __init__(
        self,
        encoded: Encoded,
        shape: tuple[int, int],
        form: NumberFormat,
        dtype: torch.dtype = torch.float32,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.form = form
        self.out_features, self.in_features = shape
        self.names = tuple(encoded)
        self.apart = tuple(name for name in encoded if name in form.floating)
        for name, tensor in encoded.items():
            self.register_buffer(name, tensor)
        self._dtype = dtype
        self.set_bias(bias)

    @classmethod
    def of(cls, weight: Tensor, form: NumberFormat, bias: Tensor | None = None) -> "Quantized":
        """Return the nearest map in a format to a weight (out_features, in_features)."""
        return cls(form.encode(weight), (weight.shape[0], weight.shape[1]), form, weight.dtype, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def encoded(self) -> Encoded:
        """The packed tensors."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def packed_numbers(self) -> int:
        """The weight's numbers, fewer those of the floating scales."""
        scales = sum(tensor.numel() for tensor in self.encoded.values() if tensor.is_floating_point())
        return self.out_features * self.in_features - scales

    def decoded(self) -> Tensor:
        """Return the weight (out_features, in_features) in the map's dtype."""
        return self.weight_of(None, tuple(self.encoded.values()))

    def weight_of(self, values: Tensor | None, stored: Sequence[Tensor]) -> Tensor:
        """Return the weight of packed tensors, those of `encoded` in order; none of them is trained, there are no values."""
        return self.form.decode(dict(zip(self.names, stored, strict=True)), self.shape).to(self._dtype)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        found = by_kernel(self, x)
        if found is None and runs_quantized(x, self.form, self.shape):
            y = quantized_linear(x, self.encoded, self.form, self.out_features)
            return y if self.bias is None else y + self.bias
        return packed_linear(x, self.bias, Packed(tuple(self.encoded.values()), self.weight_of)) if found is None else found

    def matrix(self) -> Tensor:
        """Return the decoded weight, which has no gradient."""
        return self.decoded()

    def exact(self) -> Affine:
        """Return the decoded weight and the bias in float64."""
        return Affine(self.decoded().double(), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return m n numbers in the bytes of their packed tensors, and 2 m n FLOPs a token."""
        size = self.out_features * self.in_features
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.encoded.values())
        return Cost(size, stored, 2 * tokens * size) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the format and the sizes."""
        shape = [self.out_features, self.in_features]
        return {"map": self.word, "format": self.form.model_dump(), "shape": shape, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Quantized":
        """Return an uninitialised map."""
        form, (rows, columns) = format_of(dict(structure["format"])), structure["shape"]
        bias = torch.empty(rows) if structure["bias"] else None
        return cls(form.empty((rows, columns)), (rows, columns), form, torch.get_default_dtype(), bias)

    def __repr__(self) -> str:
        return f"Quantized[{self.form.name},{self.out_features},{self.in_features}]"
