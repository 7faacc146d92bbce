"""The forms of a convolution: what they lose is what their kernels lose, in the norm of the solver."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.forms import KERNEL_FORMS, NAMES, KernelForm, forms_of, kernel_form, kernel_forms
from lrc.forms.base import Ranks, Size
from lrc.maps import ConvChain, Geometry, Indices, Patches, Rows, fold, restore
from lrc.solvers import Norm, root

F64 = torch.float64
SIZES: list[Size] = [(6, 5, 3, 3), (4, 9, 3, 5), (7, 3, 5), (4, 3, 2, 3, 3), (5, 6, 3, 1), (8, 1, 3, 3)]
EXACT = 1e-9


def pad(kernel: tuple[int, ...]) -> Geometry:
    """Strides, paddings and dilations that differ between dimensions."""
    dims = range(len(kernel))
    return Geometry(tuple(1 + (d == 0) for d in dims), tuple(k // 2 for k in kernel), tuple(1 + (d == 1) for d in dims))


def layout_of(size: Size) -> Patches:
    return Patches(size[2:], pad(size[2:]))


def moment(size: int, seed: int, *, rank: int | None = None) -> Tensor:
    X = torch.randn(size, size if rank is None else rank, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return X @ X.T


def norm_of(size: Size, seed: int = 0, *, weighed: bool = True) -> Norm:
    W = torch.randn(size[0], math.prod(size[1:]), dtype=F64, generator=torch.Generator().manual_seed(seed))
    if not weighed:
        return Norm(W)
    return Norm(W, root(moment(size[0], seed + 1), "fisher", 0.1), root(moment(math.prod(size[1:]), seed + 2), "gram", 0.1))


def weight_of(form: KernelForm, norm: Norm, size: Size, ranks: Ranks) -> Tensor:
    return form.made(norm, layout_of(size), size, ranks, F64).exact().weight


def forms(size: Size) -> tuple[KernelForm, ...]:
    return kernel_forms(layout_of(size))


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_loss_of_every_choice_is_that_of_its_kernel_in_the_whole_norm(size: Size, weighed: bool) -> None:
    norm = norm_of(size, weighed=weighed)
    total = norm.loss(torch.zeros_like(norm.target))
    for form in forms(size):
        choices = form.choices(size, 1)[:: 1 if form.name != "tucker2" else 5] or [form.at(size, 2)]
        for ranks, loss in zip(choices, form.losses(norm, size, choices).tolist(), strict=True):
            assert norm.loss(weight_of(form, norm, size, ranks)) == pytest.approx(loss, abs=EXACT * total)
            assert 0 <= loss <= total


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_fall_as_ranks_grow(size: Size) -> None:
    norm = norm_of(size)
    for form in forms(size):
        if form.name == "cp":  # every rank is decomposed by itself, to a local minimum
            continue
        top = form.limits(size)
        for side in range(len(top)):
            line = [tuple(rank if i == side else limit for i, limit in enumerate(top)) for rank in range(1, top[side] + 1)]
            losses = form.losses(norm, size, line).tolist()
            assert all(after <= before + EXACT * losses[0] for before, after in pairwise(losses))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_ranks_are_the_kernel(size: Size) -> None:
    norm = norm_of(size)
    for form in forms(size):
        found = weight_of(form, norm, size, form.limits(size))
        assert torch.allclose(found, norm.target, rtol=0, atol=1e-6 if form.name == "cp" else 1e-9)


@pytest.mark.parametrize("form", KERNEL_FORMS, ids=lambda form: form.name)
def test_a_kernel_that_has_the_form_is_found_exactly(form: KernelForm) -> None:
    size, ranks = (7, 6, 3, 3), {"spatial": (2,), "tucker2": (3, 2), "cp": (1,)}[form.name]
    shapes, layout = form.shapes(size, ranks), Patches((3, 3), pad((3, 3)))
    torch.manual_seed(0)
    planted = ConvChain([torch.randn(shape, dtype=F64) for shape in shapes], form.geometries(layout, size, ranks))
    norm = norm_of(size)
    norm = Norm(planted.exact().weight, norm.left, norm.right)
    found = weight_of(form, norm, size, ranks)
    assert torch.allclose(found, norm.target, rtol=0, atol=1e-6 * float(norm.target.abs().max()))


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 100), bias=st.booleans(), data=st.data())
def test_the_chain_is_the_convolution_with_the_composed_kernel(size: Size, seed: int, bias: bool, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(forms(size)))
    choices = form.choices(size, 1)
    if not choices:
        return
    ranks = data.draw(st.sampled_from(choices))
    layout, norm = layout_of(size), norm_of(size, seed)
    made = form.made(norm, layout, size, ranks, F64)
    made.set_bias(torch.randn(size[0], dtype=F64) if bias else None)
    x = torch.randn(2, size[1], *(9, 10, 11)[: len(size) - 2], dtype=F64)
    expected = layout.geometry(x, made.exact().weight.reshape(size), made.bias)
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    folded = fold(made)
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    restored = restore(made.structure()).to(F64)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored(x), made(x))
    outline = form.outline(layout, size, ranks, bias=bias)
    assert outline.structure() == made.structure()
    assert made.cost(1).flops == form.flops(layout, size, ranks) + size[0] * bias
    assert made.cost(1).parameters == form.numbers(size, ranks) + size[0] * bias == sum(p.numel() for p in made.parameters())


def test_without_weighing_the_spatial_split_is_the_svd_of_the_reshuffled_kernel() -> None:
    size: Size = (6, 5, 3, 4)
    norm = norm_of(size, weighed=False)
    reshuffled = norm.target.reshape(size).permute(0, 3, 1, 2).reshape(6 * 4, 5 * 3)
    values = torch.linalg.svdvals(reshuffled).square()
    losses = kernel_form("spatial").losses(norm, size, [(r,) for r in range(1, 16)])  # type: ignore[union-attr]  # it is there
    assert torch.allclose(losses, tails(values), atol=1e-10)


def tails(values: Tensor) -> Tensor:
    """The sum of what is dropped at rank 1, 2, …"""
    return torch.stack([values[rank:].sum() for rank in range(1, len(values) + 1)])


def test_all_inputs_or_all_outputs_make_tucker_a_channel_factorisation() -> None:
    size: Size = (6, 5, 3, 3)
    norm = norm_of(size)
    tucker = kernel_form("tucker2")
    assert tucker is not None
    assert norm.left is not None
    assert norm.right is not None
    values = torch.linalg.svdvals(norm.left.matrix.T @ norm.target @ norm.right.matrix).square()
    losses = tucker.losses(norm, size, [(rank, 5) for rank in range(1, 7)])
    assert torch.allclose(losses, tails(values), rtol=1e-9, atol=1e-9 * float(values.sum()))
    assert [len(tucker.shapes(size, ranks)) for ranks in ((3, 5), (6, 2), (3, 2))] == [2, 2, 3]


def test_tucker_is_no_worse_than_the_higher_order_svd_of_tensorly() -> None:
    decomposition = pytest.importorskip("tensorly.decomposition", reason="skipped: tensorly is not installed")
    size, ranks = (12, 10, 3, 3), (5, 4)
    norm = norm_of(size, weighed=False)
    tucker = kernel_form("tucker2")
    assert tucker is not None
    ours = float(tucker.losses(norm, size, [ranks])[0])
    kernel = norm.target.reshape(size).numpy()
    found = decomposition.partial_tucker(kernel, rank=list(ranks), modes=[0, 1], init="svd", n_iter_max=1)
    (core, (out, into)), _ = found
    theirs = torch.einsum("abhw,oa,cb->ochw", *(torch.from_numpy(part.copy()) for part in (core, out, into)))
    assert ours <= 1.02 * norm.loss(theirs.flatten(1))


def test_alternating_least_squares_is_about_as_good_as_that_of_tensorly() -> None:
    decomposition = pytest.importorskip("tensorly.decomposition", reason="skipped: tensorly is not installed")
    size, rank = (10, 8, 3, 3), 7
    norm = norm_of(size, weighed=False)
    cp = kernel_form("cp")
    assert cp is not None
    ours = float(cp.losses(norm, size, [(rank,)])[0])
    weights, factors = decomposition.parafac(
        norm.target.reshape(size).numpy(), rank=rank, n_iter_max=50, init="random", random_state=0
    )
    theirs = torch.einsum("r,or,cr,hr,wr->ochw", *(torch.from_numpy(part.copy()) for part in (weights, *factors)))
    assert ours <= 1.1 * norm.loss(theirs.flatten(1))


def test_losses_are_true_where_inputs_are_singular() -> None:
    size: Size = (6, 5, 3, 3)
    whole = norm_of(size)
    norm = Norm(whole.target, whole.left, root(moment(45, 3, rank=12), "gram"))
    total = norm.loss(torch.zeros_like(norm.target))
    for form in forms(size):
        for ranks in form.choices(size, 1)[::7]:
            (loss,) = form.losses(norm, size, [ranks]).tolist()
            assert norm.loss(weight_of(form, norm, size, ranks)) == pytest.approx(loss, abs=1e-6 * total)


def test_a_zero_kernel_is_no_error() -> None:
    size: Size = (6, 5, 3, 3)
    norm = Norm(torch.zeros(6, 45, dtype=F64))
    for form in forms(size):
        assert not bool(weight_of(form, norm, size, form.at(size, 2)).any())


def test_every_choice_is_smaller_and_a_multiple() -> None:
    size: Size = (64, 48, 3, 3)
    for form in forms(size):
        choices = form.choices(size, 8)
        assert choices
        assert all(form.numbers(size, ranks) < math.prod(size) for ranks in choices)
        limits = form.limits(size)
        assert all(rank % 8 == 0 or rank == limit for ranks in choices for rank, limit in zip(ranks, limits, strict=True))


def test_a_layout_has_the_forms_that_its_kernel_allows() -> None:
    assert forms_of(Rows()) == ("two_factor", "pivoted")
    assert forms_of(Indices()) == ("two_factor",)
    assert forms_of(layout_of((4, 3, 1, 1))) == ("two_factor",)
    assert forms_of(layout_of((4, 3, 5))) == ("two_factor", "tucker2", "cp")
    assert forms_of(layout_of((4, 3, 3, 3))) == ("two_factor", "spatial", "tucker2", "cp")
    assert NAMES == ("auto", "two_factor", "pivoted", "spatial", "tucker2", "cp")
    assert kernel_form("two_factor") is None
