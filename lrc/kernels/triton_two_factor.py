"""The Triton kernel of y = B (A x) + bias. Importing this module needs triton."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def two_factor_kernel(
    x, A, B, bias, y, M, N, K, rank,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute BM rows of y, all columns n with n // BN = program_id(1) modulo the programs along that axis.

    x: (M, K), A: (rank, K), B: (N, rank), y: (M, N), contiguous; bias: (N,). BR >= rank, a power of two. A x is summed in
    float32 and rounded once, to the type of x, as two products after each other do.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    inner = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x_tile = tl.load(x + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
        a_tile = tl.load(A + ranks[None, :] * K + k[:, None], mask=(ranks[None, :] < rank) & (k[:, None] < K), other=0.0)
        inner = tl.dot(x_tile, a_tile, inner, input_precision="ieee")
    h = inner.to(x.dtype.element_ty)
    for start in range(tl.program_id(1) * BN, N, BN * tl.num_programs(1)):
        n = start + tl.arange(0, BN)
        b_tile = tl.load(B + n[None, :] * rank + ranks[:, None], mask=(n[None, :] < N) & (ranks[:, None] < rank), other=0.0)
        out = tl.dot(h, b_tile, input_precision="ieee")
        if BIAS:
            out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=(rows[:, None] < M) & (n[None, :] < N))


def tiles(rank: int) -> list[dict[str, int]]:
    """Return the sizes to choose from, for a Hopper GPU and types of 16 bits: they fit on the chip and spill no registers."""
    deep = [(32, 64, 32, 8, 2), (64, 64, 32, 8, 2)]
    sizes = deep if padded(rank) > 128 else [(16, 128, 64, 4, 4), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3)]
    names = ("BM", "BN", "BK", "num_warps", "num_stages")
    return [dict(zip(names, size, strict=True)) for size in sizes]


def padded(rank: int) -> int:
    """Return the power of two, at least 16, that a rank is padded to."""
    return max(16, 1 << (rank - 1).bit_length())


def config(sizes: dict[str, int]) -> triton.Config:
    """Return a choice for the tuner."""
    kept = {name: size for name, size in sizes.items() if name.isupper()}
    return triton.Config(kept, num_warps=sizes["num_warps"], num_stages=sizes["num_stages"])


TUNED = {
    deep: triton.autotune([config(sizes) for sizes in tiles(256 if deep else 128)], key=["M", "N", "K", "rank"])(
        two_factor_kernel
    )
    for deep in (False, True)
}


def arguments(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, y: Tensor) -> tuple[list[object], dict[str, object]]:
    """Return what the kernel takes, in order, and its constants but for the sizes of tiles. x: (M, K)."""
    (M, K), (N, rank) = x.shape, B.shape
    return [x, A, B, y if bias is None else bias, y, M, N, K, rank], {"BIAS": bias is not None, "BR": padded(rank)}
