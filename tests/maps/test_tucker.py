"""A Tucker kernel is the einsum of its core and factors, whichever way it is applied."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from random_maps import randn

from lrc.maps import Conv, Geometry, Sum, Tucker, fold, restore, simplify

WHOLE = Geometry((2, 1), (1, 2), (2, 1))
DIMS = {1: Geometry((2,), (1,), (1,)), 2: WHOLE, 3: Geometry((1, 2, 1), (1, 0, 1), (1, 1, 1))}
EINSUM = {1: "abc,ia,ob,hc->oih", 2: "abcd,ia,ob,hc,wd->oihw", 3: "abcde,ia,ob,hc,wd,ze->oihwz"}


def tucker(
    geometry: Geometry, channels: tuple[int, int] = (4, 6), ranks: tuple[int, int] = (2, 3), bias: bool = True
) -> Tucker:
    dims = len(geometry.stride)
    sizes, small = (channels[0] // geometry.groups, channels[1], *(3, 2, 2)[:dims]), (*ranks, *(2, 1, 2)[:dims])
    factors = [randn(size, rank, seed=i) for i, (size, rank) in enumerate(zip(sizes, small, strict=True))]
    return Tucker(randn(*small, seed=9), factors, geometry, randn(channels[1], seed=8) if bias else None)


def kernel_of(made: Tucker) -> torch.Tensor:
    return torch.einsum(EINSUM[made.spatial], made.G, *made.factors)


@pytest.mark.parametrize("dims", DIMS)
def test_it_is_the_convolution_with_the_kernel_of_the_einsum(dims: int) -> None:
    made = tucker(DIMS[dims])
    x = randn(2, 4, *(9, 8, 7)[:dims], seed=5)
    expected = DIMS[dims](x, kernel_of(made), made.bias)
    assert torch.allclose(made.exact().weight, kernel_of(made).flatten(1), rtol=0, atol=1e-13)
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-12)
    folded = fold(made)
    assert isinstance(folded, Conv)
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-12)


def test_in_groups_the_first_factor_has_the_channels_of_one_group() -> None:
    made = tucker(replace(WHOLE, groups=2))
    x = randn(2, 4, 9, 8, seed=5)
    assert made.factors[0].shape == (2, 2)
    assert torch.allclose(made(x), made.geometry(x, kernel_of(made), made.bias), rtol=0, atol=1e-12)


def test_every_unfolding_has_at_most_the_rank_of_its_factor() -> None:
    made = tucker(WHOLE, (5, 7))
    kernel = kernel_of(made).movedim(1, 0)  # in, out, kernel
    for axis, rank in enumerate(made.G.shape):
        assert torch.linalg.matrix_rank(kernel.movedim(axis, 0).flatten(1)) <= rank


def test_full_ranks_with_orthogonal_factors_represent_any_kernel() -> None:
    kernel = randn(6, 4, 3, 3, seed=0)
    factors = [torch.linalg.qr(randn(size, size, seed=i))[0] for i, size in enumerate((4, 6, 3, 3))]
    core = torch.einsum("oihw,ia,ob,hc,wd->abcd", kernel, *factors)
    made = Tucker(core, factors, Geometry.unit(2))
    assert torch.allclose(made.exact().weight, kernel.flatten(1), rtol=0, atol=1e-13)


def test_whole_orthogonal_kernel_factors_leave_ranks_of_channels_alone() -> None:
    """Then it is 1 x 1, whole kernel, 1 x 1: the product of channels that LoRA of a convolution is, with a core between."""
    factors = [randn(4, 2, seed=0), randn(6, 3, seed=1), *(torch.linalg.qr(randn(3, 3, seed=i))[0] for i in (2, 3))]
    core = randn(2, 3, 3, 3, seed=4)
    made = Tucker(core, factors, Geometry.unit(2))
    inner = torch.einsum("abcd,hc,wd->abhw", core, *factors[2:])
    assert torch.allclose(made.exact().weight, torch.einsum("abhw,ia,ob->oihw", inner, *factors[:2]).flatten(1))
    assert torch.linalg.matrix_rank(made.exact().weight) == 3
    assert torch.linalg.matrix_rank(inner.flatten(2).permute(2, 0, 1).flatten(1)) == 6  # nothing of the kernel is lost


def test_a_factor_times_c_and_a_core_over_c_are_the_same_kernel() -> None:
    made = tucker(WHOLE)
    for axis, c in itertools.product(range(4), (0.25, -3.0)):
        factors = [factor.detach() * (c if i == axis else 1) for i, factor in enumerate(made.factors)]
        other = Tucker(made.G.detach() / c, factors, WHOLE)
        assert torch.allclose(other.exact().weight, made.exact().weight, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_costs_structure_and_text(groups: int) -> None:
    made = tucker(replace(WHOLE, groups=groups))
    numbers = math.prod(made.G.shape) + sum(f.numel() for f in made.factors) + 6
    assert made.cost(5).parameters == sum(p.numel() for p in made.parameters()) == numbers
    assert made.cost(5).bytes == 8 * numbers
    flops = 10 * 4 * 2 + 5 * (2 * 3 * 6 + 6 * 3) if groups == 1 else 5 * 6 * made.in_features
    assert made.cost(5).flops == 2 * flops + 5 * 6
    restored = restore(made.structure()).double()
    restored.load_state_dict(made.state_dict())
    x = randn(2, 4, 9, 8, seed=5)
    assert torch.equal(restored(x), made(x))
    assert repr(made) == f"Tucker[6,{4 // groups},3x2; 2,3,2,1]"


def test_it_is_merged_into_the_convolution_beside_it() -> None:
    base, made = Conv(randn(6, 4, 3, 2, seed=1), WHOLE, randn(6, seed=2)), tucker(WHOLE)
    x = randn(2, 4, 9, 8, seed=5)
    merged, notes = simplify(Sum(base, made))
    assert isinstance(merged, Conv)
    assert merged.geometry == WHOLE
    assert torch.allclose(merged(x), base(x) + made(x), rtol=0, atol=1e-12)
    assert notes


def test_factors_that_do_not_fit_the_core_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a core of shape \(2, 3\) does not fit factors of ranks \(2, 2\)"):
        Tucker(torch.zeros(2, 3), [torch.zeros(4, 2), torch.zeros(5, 2)], Geometry.unit(0))
