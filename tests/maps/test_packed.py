"""Maps that store their weight packed: quantised ones and sparse ones."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import randn
from torch import Tensor, nn

from lrc.formats import FORMATS
from lrc.maps import Chain, LinearMap, Quantized, Sparse, Sum, fold, restore, simplify

FORMAT_NAMES = st.sampled_from(list(FORMATS))
SHAPES = st.sampled_from([(1, 1), (1, 70), (70, 1), (5, 33), (64, 48)])


def sparse(m: int, n: int, density: float, seed: int = 0, bias: bool = False) -> Sparse:
    support = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < density
    return Sparse.of(randn(m, n, seed=seed).float(), support, randn(m, seed=seed + 1).float() if bias else None)


def bytes_of(made: LinearMap) -> int:
    return sum(t.numel() * t.element_size() for t in [*made.parameters(), *made.buffers()])


def check(made: LinearMap) -> None:
    """Apply, cost and restore a map."""
    x = randn(3, made.in_features, seed=9).float()
    weight, bias = made.dense()
    torch.testing.assert_close(made(x), nn.functional.linear(x, weight, bias))
    assert made.cost().bytes == bytes_of(made)
    restored = restore(json.loads(json.dumps(made.structure())))
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored(x), made(x))
    assert restored.cost(3) == made.cost(3)
    assert repr(restored) == repr(made)


@settings(max_examples=25, deadline=None)
@given(name=FORMAT_NAMES, shape=SHAPES, bias=st.booleans())
def test_a_quantised_map_is_what_it_says(name: str, shape: tuple[int, int], bias: bool) -> None:
    W = randn(*shape, seed=1).float()
    made = Quantized.of(W, FORMATS[name], randn(shape[0], seed=2).float() if bias else None)
    check(made)
    assert torch.equal(made.dense().weight, FORMATS[name].rounded(W))
    assert made.cost().parameters == W.numel() + (shape[0] if bias else 0)
    floating = sum(t.numel() for t in [*made.parameters(), *made.buffers()] if t.is_floating_point())
    assert floating + made.packed_numbers == made.cost().parameters


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, density=st.sampled_from([0.0, 0.01, 0.3, 1.0]), seed=st.integers(0, 99), bias=st.booleans())
def test_a_sparse_map_is_what_it_says(shape: tuple[int, int], density: float, seed: int, bias: bool) -> None:
    check(sparse(*shape, density, seed, bias))


def test_few_numbers_are_stored_by_position_and_many_by_a_mask() -> None:
    few, many = sparse(64, 64, 0.01), sparse(64, 64, 0.5)
    assert few.support.dtype == torch.int32
    assert many.support.dtype == torch.uint8
    assert many.cost().bytes == 4 * many.count + 64 * 64 // 8


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_gradients_reach_the_numbers_of_the_support_alone(density: float) -> None:
    made = sparse(16, 24, density)
    x = randn(5, 24, seed=3).float().requires_grad_()
    loss = made(x).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    W = made.dense().weight.requires_grad_()
    nn.functional.linear(x.detach(), W).square().sum().backward()  # type: ignore[no-untyped-call]
    assert W.grad is not None
    assert made.values.grad is not None
    torch.testing.assert_close(made.values.grad, W.grad[made.dense().weight != 0])
    assert x.grad is not None


def test_gradients_pass_through_a_quantised_map_and_train_nothing_in_it() -> None:
    made = Quantized.of(randn(16, 24, seed=1).float(), FORMATS["nf4"])
    x = randn(5, 24, seed=3).float().requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dense().weight.sum(0).expand(5, 24))
    assert list(made.parameters()) == []


def test_a_cast_changes_what_is_computed_and_not_what_is_stored() -> None:
    made = Quantized.of(randn(16, 128, seed=1).float(), FORMATS["nf4"], torch.zeros(16))
    stored = {name: tensor.clone() for name, tensor in made.encoded.items()}
    before = made.dense().weight
    made.to(torch.bfloat16)
    assert made(randn(2, 128, seed=0).bfloat16()).dtype == torch.bfloat16
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert all(torch.equal(made.encoded[name], tensor) for name, tensor in stored.items())
    assert torch.equal(made.dense().weight, before.bfloat16())


@pytest.mark.parametrize("make", [lambda W: Quantized.of(W, FORMATS["int8"]), lambda W: Sparse.of(W, W.abs() > 0.5)])
def test_merge_leaves_packed_maps_alone_unless_asked(make: object) -> None:
    def made() -> Tensor | LinearMap:
        return make(randn(16, 24, seed=1).float())  # type: ignore[operator,no-any-return]

    both = Sum(Chain(randn(16, 2, seed=2).float(), randn(2, 24, seed=3).float()), made(), bias=torch.ones(16))
    assert simplify(both).map is both
    folded = fold(both)
    x = randn(3, 24, seed=4).float()
    torch.testing.assert_close(folded(x), both(x), atol=1e-5, rtol=1e-5)
