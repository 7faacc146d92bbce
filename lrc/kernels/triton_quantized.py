"""The Triton kernel of y = W x + B (A x), W packed. Importing this module needs triton."""

import triton
import triton.language as tl
from torch import Tensor

from lrc.formats import Encoded, Integer, NormalFloat, NumberFormat, normalfloat_values
from lrc.kernels.triton_two_factor import config, padded


@triton.jit
def code_at(packed, i, plane, mask, BITS: tl.constexpr):
    """Return codes number i of `lrc.formats.packing`. plane: where the second field of codes of 3 bits begins, in bytes."""
    if BITS == 8:
        code = tl.load(packed + i, mask=mask, other=0).to(tl.int32)
    elif BITS == 3:
        high = (tl.load(packed + i // 4, mask=mask, other=0).to(tl.int32) >> ((i % 4) * 2)) & 3
        low = (tl.load(packed + plane + i // 8, mask=mask, other=0).to(tl.int32) >> (i % 8)) & 1
        code = high * 2 + low
    else:
        PER: tl.constexpr = 8 // BITS
        code = (tl.load(packed + i // PER, mask=mask, other=0).to(tl.int32) >> ((i % PER) * BITS)) & ((1 << BITS) - 1)
    return code


@triton.jit
def quantized_kernel(
    x, codes, values, scales, steps, offset, A, B, bias, y, M, N, K, width, rank, plane, scale_plane,
    BITS: tl.constexpr, BLOCK: tl.constexpr, SCALE_BITS: tl.constexpr, SUPER: tl.constexpr, LINEAR: tl.constexpr,
    BIAS: tl.constexpr, LOW_RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute a tile (BM, BN) of y.

    x: (M, K), A: (rank, K), B: (N, rank), y: (M, N), contiguous; bias: (N,). Entry (n, k) of W is code number n width + k, its
    scale that of its block of BLOCK codes. LINEAR: a code stands for code - 2^(BITS-1), else for values[code]. SCALE_BITS: 0
    for scales that are stored as they are; else they are codes, with one of `steps` for SUPER of them, above `offset`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    out = tl.zeros((BM, BN), dtype=tl.float32)
    inner = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_tile = tl.load(x + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
        inside = (n[None, :] < N) & (k[:, None] < K)
        i = n[None, :] * width + k[:, None]
        code = code_at(codes, i, plane, inside, BITS)
        if LINEAR:  # noqa: SIM108 - decided when it is compiled
            value = (code - (1 << (BITS - 1))).to(tl.float32)
        else:
            value = tl.load(values + code)
        block = i // BLOCK
        if SCALE_BITS == 0:
            scale = tl.load(scales + block, mask=inside, other=0.0).to(tl.float32)
        else:
            step = tl.load(steps + block // SUPER, mask=inside, other=0.0).to(tl.float32)
            above = code_at(scales, block, scale_plane, inside, SCALE_BITS).to(tl.float32) * step
            scale = tl.load(offset) + above / ((1 << SCALE_BITS) - 1)
        w_tile = tl.where(inside, value * scale, 0.0).to(x.dtype.element_ty)
        out = tl.dot(x_tile, w_tile, out, input_precision="ieee")
        if LOW_RANK:
            a_tile = tl.load(A + ranks[None, :] * K + k[:, None], mask=(ranks[None, :] < rank) & (k[:, None] < K), other=0.0)
            inner = tl.dot(x_tile, a_tile, inner, input_precision="ieee")
    if LOW_RANK:
        b_tile = tl.load(B + n[None, :] * rank + ranks[:, None], mask=(n[None, :] < N) & (ranks[:, None] < rank), other=0.0)
        out = tl.dot(inner.to(x.dtype.element_ty), b_tile, out, input_precision="ieee")
    if BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=(rows[:, None] < M) & (n[None, :] < N))


TILES = [
    {"BM": 16, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
]
TUNED = triton.autotune([config(sizes) for sizes in TILES], key=["M", "N", "K", "rank"])(quantized_kernel)


def arguments(
    x: Tensor, encoded: Encoded, form: NumberFormat, A: Tensor | None, B: Tensor | None, bias: Tensor | None, y: Tensor
) -> tuple[list[object], dict[str, object]]:
    """Return what the kernel takes, in order, and its constants but for the sizes of tiles. x: (M, K), y: (M, N)."""
    (M, K), N = x.shape, y.shape[1]
    rank = 0 if A is None else A.shape[0]
    linear = isinstance(form, Integer)
    width = -(-K // form.block) * form.block if isinstance(form, Integer) else K
    scale_bits = form.scale_bits if isinstance(form, NormalFloat) and form.scale_bits is not None else 0
    scales = encoded["scale_codes"] if scale_bits else encoded["scales"]
    blocks = -(-N * width // form.block)  # type: ignore[attr-defined]  # of the two formats
    given = [
        x, encoded["codes"], y if linear else normalfloat_values(form.bits).to(x.device), scales,
        encoded.get("steps", scales), encoded.get("offset", scales), x if A is None else A, x if B is None else B,
        y if bias is None else bias, y, M, N, K, width, rank, -(-N * width // 4), -(-blocks // 4),
    ]  # fmt: skip
    return given, {
        "BITS": form.bits, "BLOCK": form.block, "SCALE_BITS": scale_bits,  # type: ignore[attr-defined]
        "SUPER": form.super_block if isinstance(form, NormalFloat) else 1, "LINEAR": linear, "BIAS": bias is not None,
        "LOW_RANK": rank > 0, "BR": padded(max(rank, 1)),
    }  # fmt: skip
