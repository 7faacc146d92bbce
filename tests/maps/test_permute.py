"""An order of the outputs or inputs is taken into a map where it can be, and refused where it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import F64, order_of, pivoted, randn, rounding, seeds, shapes

from lrc.maps import Chain, Dense, Diagonal, LinearMap, Permutation, Pivoted, Scale, Sum, permute_inputs, permute_outputs


@st.composite
def movable(draw: st.DrawFn, m: int, n: int, depth: int = 1) -> LinearMap:
    """A map whose outputs and inputs can be put in another order."""
    seed = draw(seeds)
    bias = randn(m, seed=seed + 9) if draw(st.booleans()) else None
    kind = draw(st.sampled_from(["dense", "out", "in", *(["chain", "sum"] if depth else [])]))
    if kind == "dense":
        return Dense(randn(m, n, seed=seed), bias)
    if kind == "chain":
        k = draw(st.integers(1, 4))
        return Chain(draw(movable(m, k, 0)), Diagonal(randn(k, seed=seed)), draw(movable(k, n, 0)), bias=bias)
    if kind == "sum":
        return Sum(randn(m, n, seed=seed), draw(movable(m, n, 0)), bias=bias, names=["base", "delta"])
    return pivoted(m, n, draw(st.integers(1, min(m, n))), seed, kind, index=draw(st.booleans()), bias=bias is not None)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_permuted_outputs_are_the_outputs_in_that_order(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    m, n = shape
    made, order, x = data.draw(movable(m, n)), order_of(m, seed), randn(3, n, seed=seed)
    moved = permute_outputs(made, order)
    assert moved is not None
    assert ((moved(x) - made(x)[:, order]).abs() <= 2 * rounding(made, x)[:, order]).all()
    assert moved.cost(2).parameters == made.cost(2).parameters
    assert moved.cost(2).flops == made.cost(2).flops


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_permuted_inputs_undo_an_order_of_the_input(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    m, n = shape
    made, order, x = data.draw(movable(m, n)), order_of(n, seed), randn(3, n, seed=seed)
    moved = permute_inputs(made, order)
    assert moved is not None
    assert ((moved(x[:, order]) - made(x)).abs() <= 2 * rounding(made, x)).all()
    assert moved.cost(2).parameters == made.cost(2).parameters


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 3, 2), (3, 7, 2), (4, 4, 1), (5, 1, 1), (1, 5, 1)])
def test_a_pivoted_map_that_is_put_in_its_own_order_loses_its_index(m: int, n: int, rank: int) -> None:
    made = pivoted(m, n, rank, 1)
    moved = permute_outputs(made, made.index.long().argsort())
    assert isinstance(moved, Pivoted)
    assert moved.index is None
    assert moved.P is made.P
    assert moved.Z is made.Z
    back = permute_outputs(moved, made.index.long())
    assert isinstance(back, Pivoted)
    assert m == 1 or torch.equal(back.index, made.index)


def test_pivot_columns_lose_their_index_to_the_right_order_of_inputs() -> None:
    made = pivoted(4, 6, 2, 1, "in")
    moved = permute_inputs(made, made.index.long())
    assert isinstance(moved, Pivoted)
    assert moved.index is None
    x = randn(3, 6, seed=0)
    assert torch.equal(moved(x[:, made.index.long()]), made(x))


def test_the_bias_moves_with_the_outputs_and_stays_with_the_inputs() -> None:
    made = Dense(torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0]))
    outputs, inputs = permute_outputs(made, torch.tensor([2, 0, 1])), permute_inputs(made, torch.tensor([3, 2, 1, 0]))
    assert outputs is not None
    assert inputs is not None
    assert outputs.bias.tolist() == [3.0, 1.0, 2.0]
    assert inputs.bias is made.bias


def test_parts_keep_their_names() -> None:
    made = Sum(randn(3, 4, seed=0), randn(3, 4, seed=1), names=["base", "delta"])
    for moved in (permute_outputs(made, order_of(3, 0)), permute_inputs(made, order_of(4, 0))):
        assert isinstance(moved, Sum)
        assert moved.names == ("base", "delta")


@pytest.mark.parametrize(
    "made",
    [
        Diagonal(randn(4, seed=0)),
        Permutation(order_of(4, 0), F64),
        Scale(randn(4, 4, seed=0), 2.0),
        Chain(Diagonal(randn(4, seed=0))),
        Sum(randn(4, 4, seed=0), Diagonal(randn(4, seed=0))),
    ],
    ids=repr,
)
def test_a_map_that_cannot_take_an_order_in_answers_none(made: LinearMap) -> None:
    assert permute_outputs(made, order_of(4, 1)) is None
    assert permute_inputs(made, order_of(4, 1)) is None
