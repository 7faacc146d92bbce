"""Kernels for GPUs, and the operators of torch that run them. On other devices an operator is its reference, in plain ATen.

`two_factor_linear`  y = B (A x) + bias, in one kernel: what stands between the factors never leaves the chip
`quantized_linear`   y = W x + B (A x), W packed: decoded where it is multiplied, in one pass over x
`grouped_linear`     y = W[e] x for rows sorted by their expert e
"""

from lrc.kernels.choice import refusal, runs_quantized, runs_two_factor
from lrc.kernels.grouped import grouped_linear
from lrc.kernels.ops import quantized_linear, two_factor_linear

__all__ = ["grouped_linear", "quantized_linear", "refusal", "runs_quantized", "runs_two_factor", "two_factor_linear"]
