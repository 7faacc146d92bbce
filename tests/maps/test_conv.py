"""Convolutions as maps: what a chain of them stands for, what it costs, how it is stored, and the layout that makes it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrc.maps import Conv, ConvChain, Geometry, Patches, fold, planned, restore

F64 = torch.float64
GEOMETRIES = [
    ((3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((3, 5), Geometry((2, 1), (2, 4), (2, 2))),
    ((5,), Geometry((2,), (2,), (1,))),
    ((3, 1, 2), Geometry((1, 2, 1), (1, 0, 1), (1, 1, 1))),
    ((1, 1), Geometry((2, 2), (0, 0), (1, 1))),
]


def image(dims: int, channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, channels, *(9, 8, 7)[:dims], dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES)
def test_rows_of_patches_times_the_matrix_are_the_convolution(kernel: tuple[int, ...], geometry: Geometry) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 4, *kernel, dtype=F64), image(len(kernel))
    layout = Patches(kernel, geometry)
    rows = layout.inputs(x)
    assert rows.shape[-1] == layout.shape(tuple(weight.shape))[1] == 4 * math.prod(kernel)
    assert torch.allclose(rows @ weight.flatten(1).T, layout.outputs(geometry(x, weight)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES)
def test_a_product_is_the_convolution_with_the_kernel_b_a(kernel: tuple[int, ...], geometry: Geometry) -> None:
    torch.manual_seed(0)
    size = 4 * math.prod(kernel)
    B, A, bias = torch.randn(6, 3, dtype=F64), torch.randn(3, size, dtype=F64), torch.randn(6, dtype=F64)
    made, x = Patches(kernel, geometry).product(B, A, bias), image(len(kernel))
    expected = geometry(x, (B @ A).reshape(6, 4, *kernel), bias)
    assert isinstance(made, ConvChain)
    assert (made.out_features, made.in_features) == (6, size)
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(made.exact().weight, B @ A, rtol=0, atol=1e-13)
    folded = fold(made)
    assert isinstance(folded, Conv)
    assert folded.geometry == geometry
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-12)
    assert fold(folded) is folded


def test_a_spatial_split_and_a_tucker_core_stand_for_one_kernel() -> None:
    torch.manual_seed(0)
    whole = Geometry((2, 1), (1, 2), (1, 2))
    x = image(2)
    split = ConvChain(
        [torch.randn(6, 3, 1, 3, dtype=F64), torch.randn(3, 4, 3, 1, dtype=F64)], [whole.along([1]), whole.along([0])]
    )
    core = ConvChain(
        [torch.randn(6, 2, 1, 1, dtype=F64), torch.randn(2, 3, 3, 3, dtype=F64), torch.randn(3, 4, 1, 1, dtype=F64)],
        [Geometry.unit(2), whole, Geometry.unit(2)],
    )
    for made in (split, core):
        folded = made.folded()
        assert folded.weight.shape == (6, 4, 3, 3)
        assert folded.geometry == whole
        assert torch.allclose(folded(x), made(x), rtol=0, atol=1e-12)
        assert torch.allclose(made.exact().weight, folded.exact().weight)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 5), stride=st.integers(1, 3), size=st.integers(4, 9), bias=st.booleans())
def test_cost_counts_what_is_stored_and_multiplied(rank: int, stride: int, size: int, bias: bool) -> None:
    geometry = Geometry((stride, stride), (1, 1), (1, 1))
    made = planned(Patches((3, 3), geometry), (6, 36), rank, bias=bias)
    positions = made(torch.randn(1, 4, size, size))[0, 0].numel()
    cost = made.cost(positions)
    assert cost.parameters == sum(p.numel() for p in made.parameters()) == rank * (36 + 6) + 6 * bias
    assert cost.bytes == 4 * cost.parameters
    assert cost.flops == positions * (2 * rank * (36 + 6) + 6 * bias)


def test_flops_before_a_stride_are_counted_at_their_own_positions() -> None:
    kernels = [torch.randn(6, 2, 1, 1), torch.randn(2, 3, 3, 3), torch.randn(3, 4, 1, 1)]
    core = ConvChain(kernels, [Geometry.unit(2), Geometry((2, 2), (1, 1), (1, 1)), Geometry.unit(2)])
    assert core.cost(25).flops == 2 * 25 * (12 + 54) + 2 * 100 * 12


@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
def test_structures_restore_what_they_were_made_of(kernel: tuple[int, ...], geometry: Geometry, bias: bool) -> None:
    product = planned(Patches(kernel, geometry), (6, 4 * math.prod(kernel)), 2, bias=bias)
    for parameter in product.parameters():
        nn.init.normal_(parameter)
    for made in (product, fold(product)):
        restored = restore(made.structure())
        assert type(restored) is type(made)
        assert restored.structure() == made.structure()
        restored.load_state_dict(made.state_dict())
        x = image(len(kernel)).float()
        assert torch.allclose(restored(x), made(x), rtol=1e-5, atol=1e-5)  # memory formats round in their own ways


def test_a_dense_map_is_the_module_itself() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    geometry = replace(Geometry((2, 2), (1, 1), (1, 1)), groups=2)
    made, x = Conv(module.weight, geometry, module.bias), image(2).float()
    assert torch.equal(made(x), module(x))
    assert repr(made) == "Conv[6,2,3x3]"
    assert repr(planned(Patches((3, 3), geometry), (6, 36), 2, bias=False)) == "ConvChain([6,2,1x1], [4,4,3x3])"
    one = replace(geometry, groups=1)
    assert repr(planned(Patches((3, 3), one), (6, 36), 2, bias=False)) == "ConvChain([6,2,1x1], [2,4,3x3])"


@torch.no_grad()
def test_a_product_in_groups_is_a_product_of_every_group() -> None:
    torch.manual_seed(0)
    geometry = Geometry((2, 1), (1, 0), (1, 2), groups=3)
    layout, x = Patches((3, 2), geometry), image(2, channels=12)
    B, A = torch.randn(6, 2, dtype=F64), torch.randn(2, 3, 24, dtype=F64)
    made = layout.product(B, A, torch.randn(6, dtype=F64))
    weight = torch.cat([B[2 * g : 2 * g + 2] @ A[:, g] for g in range(3)])
    expected = geometry(x, weight.reshape(6, 4, 3, 2), made.bias)
    assert (made.out_features, made.in_features) == (6, 24)
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(made.exact().weight, weight, rtol=0, atol=1e-13)
    folded = fold(made)
    assert isinstance(folded, Conv)
    assert folded.geometry == geometry
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-12)
    rows = layout.inputs(x)
    assert rows.shape[-1] == 3 * 24
    blocks = torch.einsum("bhwgn,gon->bhwgo", rows.unflatten(-1, (3, 24)), weight.reshape(3, 2, 24)).flatten(-2)
    assert torch.allclose(blocks, layout.outputs(geometry(x, weight.reshape(6, 4, 3, 2))), rtol=0, atol=1e-12)
