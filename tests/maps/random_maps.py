"""Random maps of a given shape, and a rounding bound for them."""

import copy
import math
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from lrc.maps import (
    Blocks,
    Chain,
    Dense,
    Diagonal,
    Gate,
    Identity,
    Kronecker,
    LinearMap,
    OutputMask,
    Permutation,
    Pivoted,
    Scalar,
    Scale,
    Sum,
    Triangular,
)

F64 = torch.float64
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 7), (7, 3), (4, 4)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**16)


def randn(*size: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def order_of(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def pivoted(m: int, n: int, rank: int, seed: int, side: str = "out", *, index: bool = True, bias: bool = True) -> Pivoted:
    rows, other = (m, n) if side == "out" else (n, m)
    P = randn(rank, other, seed=seed)
    return Pivoted(
        P if side == "out" else P.T.contiguous(),
        randn(rows - rank, rank, seed=seed + 1),
        order_of(rows, seed + 2) if index else None,
        side,  # type: ignore[arg-type]
        randn(m, seed=seed + 3) if bias else None,
    )


def closed(size: int, seed: int) -> Tensor:
    """Random numbers of which some are exactly zero."""
    return randn(size, seed=seed) * (randn(size, seed=seed + 1) > 0)


@st.composite
def maps(draw: st.DrawFn, m: int, n: int, depth: int = 2) -> LinearMap:
    """A map (m, n) of random kind, with biases here and there; composites up to `depth` deep."""
    seed = draw(seeds)
    bias = randn(m, seed=seed + 9) if draw(st.booleans()) else None
    kinds = ["dense", "pair", "pivoted", "triangular", "blocks", "kronecker", "gated"]
    if m == n:
        kinds += ["diagonal", "permutation", "identity", "gate", "passing", "mask", "scalar"]
    if depth:
        kinds += ["chain", "sum", "scale", "single"] * 2
    kind = draw(st.sampled_from(kinds))
    if kind == "dense":
        return Dense(randn(m, n, seed=seed), bias)
    if kind == "diagonal":
        return Diagonal(randn(m, seed=seed), bias)
    if kind == "permutation":
        return Permutation(order_of(m, seed), F64)
    if kind == "identity":
        return Permutation(torch.arange(m), F64)
    if kind == "gate":
        return Gate(closed(m, seed), bias)
    if kind == "passing":
        return Identity(m, F64)
    if kind == "mask":
        return OutputMask(closed(m, seed) != 0, F64)
    if kind == "scalar":
        return Scalar(randn(1, seed=seed), m, bias)
    if kind == "triangular":
        return Triangular.of(randn(m, n, seed=seed), upper=m < n, unit=draw(st.booleans()), bias=bias)
    if kind == "blocks":
        along, size = draw(st.sampled_from([("out", m), ("in", n)]))
        first = draw(st.integers(0, size))
        parts = randn(m, n, seed=seed).split([first, size - first], 0 if along == "out" else 1)
        return Blocks(*(part.clone() for part in parts), along, bias)
    if kind == "kronecker":
        count, rank = math.gcd(m, n), draw(st.integers(1, 2))
        left, right = randn(count, n // count, rank, seed=seed + 1), randn(count, rank, m // count, seed=seed + 2)
        return Kronecker(randn(count, count, count, seed=seed), left, right, bias)
    if kind == "gated":
        rank = draw(st.integers(1, 4))
        return Chain(randn(m, rank, seed=seed), Gate(closed(rank, seed + 1)), randn(rank, n, seed=seed + 2), bias=bias)
    if kind == "pivoted":
        side = draw(st.sampled_from(["out", "in"]))
        return pivoted(m, n, draw(st.integers(1, min(m, n))), seed, side, index=draw(st.booleans()), bias=bias is not None)
    if kind == "pair":
        rank = draw(st.integers(1, 4))
        return Chain(randn(m, rank, seed=seed), randn(rank, n, seed=seed + 1), bias=bias)
    if kind == "scale":
        return Scale(draw(maps(m, n, depth - 1)), draw(st.sampled_from([-1.5, 0.25, 2.0])), bias)
    if kind == "single":
        return draw(st.sampled_from([Chain, Sum]))(draw(maps(m, n, depth - 1)), bias=bias)
    if kind == "sum":
        return Sum(*(draw(maps(m, n, depth - 1)) for _ in range(draw(st.integers(2, 3)))), bias=bias)
    middle = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    sizes = [m, *middle, n]
    return Chain(*(draw(maps(a, b, depth - 1)) for a, b in pairwise(sizes)), bias=bias)


def rounding(made: LinearMap, x: Tensor) -> Tensor:
    """Return what rounding may change in `made(x)`: eps times the longest sum, times the same map of absolute values."""
    absolute = copy.deepcopy(made)
    for part in absolute.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data.abs_()
        if isinstance(part, Scale):
            part.scale = abs(part.scale)
    longest = 8 + sum(sum(p.shape) for p in made.parameters())
    return longest * torch.finfo(made.dtype).eps * absolute(x.abs()) + torch.finfo(made.dtype).tiny


def assert_equal_maps(a: LinearMap, b: LinearMap) -> None:
    """The two stand for one weight and one bias, up to the rounding of the first."""
    x = torch.cat([torch.eye(a.in_features, dtype=F64), torch.zeros(1, a.in_features, dtype=F64)])
    weight, bias = b.exact()
    expected = x @ weight.T + (0 if bias is None else bias)
    assert ((a(x) - expected).abs() <= 2 * rounding(a, x)).all()
    assert ((b(x) - expected).abs() <= 2 * rounding(b, x)).all()
