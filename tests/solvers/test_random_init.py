"""Random factors: the start of two new linear layers, and nothing of what the layer had learned."""

import math

import pytest
import torch
from solver_cases import EPS, F64, SHAPES, generator, randn, solved
from torch import nn

from lrc.solvers import Moments, random_init


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_weight_nor_bias_is_used_beyond_shape_and_presence(shape: tuple[int, int]) -> None:
    rank = max(1, min(shape) // 2)
    one, other = (solved(random_init, randn(*shape, seed=i), bias=randn(shape[0], seed=i + 5), rank=rank) for i in (0, 1))
    assert torch.equal(one.B, other.B)
    assert torch.equal(one.A, other.A)
    assert one.bias is not None
    assert other.bias is not None
    assert torch.equal(one.bias, other.bias)
    assert one.bias.shape == (shape[0],)
    assert solved(random_init, randn(*shape, seed=0), rank=rank).bias is None


def test_entries_are_spread_as_those_of_new_linear_layers() -> None:
    terms = solved(random_init, randn(300, 200, seed=0), bias=randn(300, seed=1), rank=50)
    torch.manual_seed(0)
    first, second = nn.Linear(200, 50, bias=False), nn.Linear(50, 300)
    assert terms.bias is not None
    for made, like in ((terms.A, first.weight.data), (terms.B, second.weight.data), (terms.bias, second.bias.data)):
        bound = 1 / math.sqrt(200 if made is terms.A else 50)
        deviation = bound / math.sqrt(3 * made.numel())  # of the mean of uniform entries
        assert made.shape == like.shape
        assert float(made.abs().max()) <= bound
        assert float(like.abs().max()) <= bound
        assert abs(float(made.mean())) <= 5 * deviation
        assert abs(float(made.double().square().mean()) / (bound**2 / 3) - 1) <= 5 * math.sqrt(0.8 / made.numel())


def test_the_loss_is_the_true_one_and_a_note_says_that_the_layer_is_to_be_trained() -> None:
    W = randn(6, 4, seed=0)
    terms = solved(random_init, W, rank=2)
    error = float((W - terms.B @ terms.A).square().sum())
    assert abs(float(terms.losses()[2]) - error) <= 64 * EPS * error
    assert terms.notes == (
        "random factors: what the layer has learned, its bias included, is discarded, and the model has to be trained",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_are_made_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    B, A, bias = solved(random_init, randn(6, 4, seed=0, dtype=F64).to(dtype), bias=randn(6, seed=1), rank=2).truncate(2, dtype)
    assert bias is not None
    assert B.dtype == A.dtype == bias.dtype == dtype


def test_a_seed_gives_the_same_factors_and_another_one_others() -> None:
    W, options = randn(6, 4, seed=0), random_init.options()
    one, same, other = (random_init(W, None, Moments(), 2, options, generator(seed)).A for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert random_init.name == "random"
    assert not random_init.options.nested
