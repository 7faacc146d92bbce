"""Normalisation to length: what is left of a norm once its gain and its mean are taken into the linears about it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrc.maps.base import Structure


class RmsNorm(nn.Module):
    """y = x / sqrt(sum(x²) / features + eps), over the last dimension, computed in float32 at least.

    features: how many numbers the sum is divided by; a stream that lost directions still counts those. It has no numbers of
    its own and is no linear map.
    """

    word: ClassVar[str] = "rms_norm"

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.features = features
        self.eps = eps

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., any number of features)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.features + self.eps)).to(x.dtype)

    def structure(self) -> Structure:
        """Return the two constants."""
        return {"map": self.word, "features": self.features, "eps": self.eps}

    @classmethod
    def restored(cls, structure: Structure) -> "RmsNorm":
        """Return the norm itself."""
        return cls(structure["features"], structure["eps"])

    def extra_repr(self) -> str:
        """Return the constants for the one-line text."""
        return f"{self.features}, eps={self.eps:g}"
