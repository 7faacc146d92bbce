"""Runs the Triton kernels in Triton's interpreter and prints how far each is from its reference, as JSON. A process of its own:
the variable TRITON_INTERPRET is read when kernels are imported.
"""

import json
from typing import Any

import torch
from torch import Tensor

from lrc.formats import FORMATS, Integer, NormalFloat, NumberFormat
from lrc.kernels import triton_quantized, triton_two_factor

FORMS: list[NumberFormat] = [
    *FORMATS.values(),
    Integer(block=100),
    NormalFloat(bits=4, scale_bits=None, scale_dtype="float16"),
    NormalFloat(bits=3, block=32, scale_bits=3, super_block=16),
]
SIZES = {"BM": 16, "BN": 32, "BK": 32}


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def blocks(size: int, tile: int) -> int:
    return -(-size // tile)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def two_factor(M: int, K: int, N: int, rank: int, bias: bool, dtype: torch.dtype, splits: int) -> float:
    x, A, B = randn(M, K).to(dtype), randn(rank, K, seed=1).to(dtype), randn(N, rank, seed=2).to(dtype)
    b = randn(N, seed=3).to(dtype) if bias else None
    y = torch.full((M, N), torch.nan, dtype=dtype)
    given, constants = triton_two_factor.arguments(x, A, B, b, y)
    triton_two_factor.two_factor_kernel[(blocks(M, 16), splits)](*given, **constants, **SIZES)
    inner = (x.double() @ A.double().T).to(dtype).double()
    return error(y, inner @ B.double().T + (0 if b is None else b.double()))


def quantized(M: int, K: int, N: int, form: NumberFormat, rank: int, dtype: torch.dtype) -> float:
    x, encoded = randn(M, K).to(dtype), form.encode(randn(N, K, seed=1))
    A, B = (randn(rank, K, seed=2).to(dtype), randn(N, rank, seed=3).to(dtype)) if rank else (None, None)
    b = randn(N, seed=4).to(dtype) if rank else None
    y = torch.full((M, N), torch.nan, dtype=dtype)
    given, constants = triton_quantized.arguments(x, encoded, form, A, B, b, y)
    triton_quantized.quantized_kernel[(blocks(M, 16), blocks(N, 32))](*given, **constants, **SIZES)
    expected = x.double() @ form.decode(encoded, (N, K)).to(dtype).double().T
    if A is not None and B is not None and b is not None:
        expected = expected + (x.double() @ A.double().T).to(dtype).double() @ B.double().T + b.double()
    return error(y, expected)


def main() -> None:
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16):
        for M, K, N, rank, bias, splits in ((5, 70, 40, 3, True, 2), (33, 64, 96, 20, False, 1), (1, 1, 1, 1, True, 1)):
            found[f"two_factor {M} {K} {N} {rank} {dtype}"] = two_factor(M, K, N, rank, bias, dtype, splits)
    for place, form in enumerate(FORMS):
        for rank in (0, 5):
            found[f"{form.name} {place} {rank}"] = quantized(5, 72, 37, form, rank, torch.float32)
    found["nf4 half"] = quantized(17, 72, 37, FORMATS["nf4"], 5, torch.float16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
