"""Folding keeps what a map stands for, makes it no larger, says what it did, and finds nothing more the second time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import F64, assert_equal_maps, maps, order_of, pivoted, randn, shapes

from lrc.maps import Chain, Dense, Diagonal, LinearMap, Permutation, Scale, Sum, fold, simplify


def d(m: int, n: int, seed: int = 0, *, bias: bool = False) -> Dense:
    return Dense(randn(m, n, seed=seed), randn(m, seed=seed + 1) if bias else None)


def pair(m: int, r: int, n: int, seed: int = 0, *, bias: bool = False) -> Chain:
    return Chain(randn(m, r, seed=seed), randn(r, n, seed=seed + 1), bias=randn(m, seed=seed + 2) if bias else None)


RULES = {
    "flatten a chain in a chain": (
        Chain(pair(8, 2, 3), Diagonal(randn(3, seed=1)), pivoted(3, 8, 2, 5)),
        "flatten nested",
        "Chain(Dense[8,2], Dense[2,3], Pivoted[3,2,8])",
    ),
    "flatten an outer chain with a bias": (
        Chain(pair(8, 1, 8, bias=True), pivoted(8, 8, 2, 5), bias=randn(8, seed=7)),
        "flatten nested",
        "Chain(Dense[8,1], Dense[1,8], Pivoted[8,2,8])",
    ),
    "flatten a sum in a sum": (
        Sum(pivoted(8, 8, 2, 0), Sum(pivoted(8, 8, 2, 5), pivoted(8, 8, 2, 9), bias=randn(8, seed=3)), bias=randn(8, seed=4)),
        "flatten nested",
        "Sum(Pivoted[8,2,8], Pivoted[8,2,8], Pivoted[8,2,8])",
    ),
    "unwrap a chain of one": (Chain(pivoted(8, 6, 2, 0), bias=randn(8, seed=3)), "unwrap single", "Pivoted[8,2,6]"),
    "unwrap a sum of one matrix": (Sum(randn(8, 6, seed=0), bias=randn(8, seed=3)), "unwrap single", "Dense[8,6]"),
    "unwrap around a permutation": (
        Chain(Permutation(order_of(8, 3), F64), bias=randn(8, seed=3)),
        "unwrap single",
        "Permutation[8]",
    ),
    "absorb a scale in a matrix": (Scale(d(8, 6, bias=True), -0.5, randn(8, seed=3)), "absorb scale", "Dense[8,6]"),
    "absorb a scale in a product": (Scale(pair(8, 2, 8), 3.0, randn(8, seed=3)), "absorb scale", "Chain[8,2,8]"),
    "drop an identity": (
        Chain(pivoted(8, 8, 2, 0), Permutation(torch.arange(8), F64), pivoted(8, 8, 2, 5)),
        "drop identity",
        "Chain(Pivoted[8,2,8], Pivoted[8,2,8])",
    ),
    "drop all but one of identities alone": (
        Chain(Permutation(torch.arange(8), F64), Permutation(torch.arange(8), F64), bias=randn(8, seed=3)),
        "drop identity",
        "Permutation[8]",
    ),
    "join two products of a sum": (
        Sum(pair(9, 1, 9), pair(9, 2, 9, 5), bias=randn(9, seed=3)),
        "join low rank terms",
        "Chain[9,3,9]",
    ),
    "join products around another term": (
        Sum(pair(9, 1, 9), pivoted(9, 9, 3, 8), pair(9, 2, 9, 5)),
        "join low rank terms",
        "Sum(Pivoted[9,3,9], Chain[9,3,9])",
    ),
    "multiply out what one matrix holds": (Chain(d(4, 8), d(8, 4, 3, bias=True)), "multiply out", "Dense[4,4]"),
    "multiply a diagonal into its neighbour": (
        Chain(randn(8, 2, seed=0), Diagonal(randn(2, seed=1)), randn(2, 8, seed=2)),
        "multiply out",
        "Chain[8,2,8]",
    ),
    "multiply a permutation into its neighbour": (
        Chain(Permutation(order_of(8, 2), F64), d(8, 3)),
        "multiply out",
        "Dense[8,3]",
    ),
    "merge an adapter of another form": (Sum(pivoted(8, 6, 2, 0), d(8, 6)), "fold adapters", "Dense[8,6]"),
    "merge an adapter": (Sum(d(8, 6), Scale(pair(8, 2, 6), 2.0), bias=randn(8, seed=3)), "fold adapters", "Dense[8,6]"),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_makes_an_equal_smaller_map_and_says_so(name: str) -> None:
    made, note, expected = RULES[name]
    smaller, notes = simplify(made)
    assert repr(smaller) == expected
    assert any(text.startswith(f"{note}: ") for text in notes), notes
    assert any(text.endswith(f"-> {expected}") for text in notes), notes
    assert_equal_maps(made, smaller)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_simplified_maps_are_equal_and_need_no_more_numbers_or_flops(shape: tuple[int, int], data: st.DataObject) -> None:
    made = data.draw(maps(*shape, depth=3))
    smaller, notes = simplify(made)
    before, after = made.cost(1), smaller.cost(1)
    assert after.parameters <= before.parameters
    assert after.flops <= before.flops
    assert_equal_maps(made, smaller)
    assert (smaller is made) == (notes == ())


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_simplifying_twice_changes_nothing_the_second_time(shape: tuple[int, int], data: st.DataObject) -> None:
    once = simplify(data.draw(maps(*shape, depth=3))).map
    twice, notes = simplify(once)
    assert twice is once
    assert notes == ()


def test_what_becomes_foldable_by_joining_is_folded_in_the_same_run() -> None:
    made = Sum(pivoted(6, 6, 3, 0), pair(6, 2, 6), pair(6, 2, 6, 5))
    smaller, notes = simplify(made)
    assert repr(smaller) == "Dense[6,6]"
    assert [text.split(":")[0] for text in notes] == ["join low rank terms", "multiply out", "unwrap single", "fold adapters"]
    assert_equal_maps(made, smaller)


@pytest.mark.parametrize(
    "made",
    [
        d(8, 6, bias=True),
        pair(8, 2, 6, bias=True),
        pivoted(8, 6, 2, 0),
        Permutation(order_of(8, 0), F64),
        Diagonal(randn(8, seed=0)),
        Scale(pivoted(8, 6, 2, 0), 2.0),
        Chain(Permutation(order_of(8, 0), F64), Permutation(order_of(8, 1), F64)),
    ],
    ids=repr,
)
def test_a_map_that_no_rule_fits_comes_back_as_the_same_object(made: LinearMap) -> None:
    assert simplify(made) == (made, ())


def test_a_product_is_not_multiplied_out_where_that_would_need_more_numbers() -> None:
    exact, over = pair(6, 3, 6), pair(6, 2, 6)
    assert repr(simplify(exact).map) == "Dense[6,6]"
    assert simplify(over).map is over


def test_a_bias_inside_counts_when_a_product_is_weighed_against_one_matrix() -> None:
    made = Chain(randn(6, 1, seed=0), Dense(randn(1, 1, seed=1), randn(1, seed=2)))
    smaller, _ = simplify(made)
    assert smaller.cost().parameters <= made.cost().parameters == 8
    assert_equal_maps(made, smaller)


def test_rules_reach_parts_of_parts() -> None:
    inner = Scale(Sum(pair(9, 1, 9), pair(9, 1, 9, 4)), 0.5)
    made = Chain(pivoted(9, 9, 2, 3), inner)
    smaller, notes = simplify(made)
    assert repr(smaller) == "Chain(Pivoted[9,2,9], Dense[9,2], Dense[2,9])"
    assert [text.split(":")[0] for text in notes] == ["join low rank terms", "unwrap single", "absorb scale", "flatten nested"]
    assert_equal_maps(made, smaller)


def test_parts_keep_their_names_when_one_of_them_is_simplified() -> None:
    made = Sum(pivoted(9, 9, 2, 3), Chain(pivoted(9, 9, 2, 0)), names=["base", "delta"])
    smaller, _ = simplify(made)
    assert isinstance(smaller, Sum)
    assert smaller.names == ("base", "delta")


def test_the_bias_of_an_inner_map_is_carried_outwards() -> None:
    W, V, c, b = randn(4, 8, seed=0), randn(8, 4, seed=1), randn(8, seed=2), randn(4, seed=3)
    smaller, _ = simplify(Chain(W, Dense(V, c), bias=b))
    weight, bias = smaller.dense()
    assert bias is not None
    tolerance = 4 * 8 * torch.finfo(F64).eps
    assert torch.allclose(weight, W @ V, rtol=0, atol=tolerance * float(W.norm() * V.norm()))
    assert torch.allclose(bias, W @ c + b, rtol=0, atol=tolerance * float(W.norm() * c.norm() + b.norm()))


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_fold_returns_the_dense_map_and_a_dense_map_itself(shape: tuple[int, int], data: st.DataObject) -> None:
    made = data.draw(maps(*shape))
    dense = fold(made)
    assert isinstance(dense, Dense)
    assert fold(dense) is dense
    weight, bias = made.dense()
    assert torch.equal(dense.weight, weight)
    assert (dense.bias is None) == (bias is None)
    assert bias is None or torch.equal(dense.bias, bias)


def test_fold_refuses_what_has_no_dense_form() -> None:
    class Bent(LinearMap):
        word = "bent"
        out_features = in_features = 3

    with pytest.raises(TypeError, match="Bent has no dense form"):
        fold(Bent())
