"""A map without its numbers is plain data, and that data gives the same map back."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import F64, maps, pivoted, randn, shapes

from lrc.maps import Chain, Dense, Permutation, Rows, Scale, Sum, pivoted_structure, planned, restore


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_a_restored_map_takes_the_numbers_of_the_stored_one(shape: tuple[int, int], data: st.DataObject) -> None:
    made = data.draw(maps(*shape, depth=3))
    structure = made.structure()
    restored = restore(json.loads(json.dumps(structure))).double()
    assert repr(restored) == repr(made)
    assert {name: t.shape for name, t in restored.state_dict().items()} == {
        name: t.shape for name, t in made.state_dict().items()
    }
    assert restored.structure() == structure
    assert restored.cost(3) == made.cost(3)
    restored.load_state_dict(made.state_dict())
    x = randn(2, shape[1], seed=0)
    assert torch.equal(restored(x), made(x))


def test_names_of_parts_survive() -> None:
    made = Sum(randn(3, 4, seed=0), Scale(Chain(randn(3, 2, seed=1), randn(2, 4, seed=2)), 0.5), names=["base", "delta"])
    restored = restore(made.structure())
    assert set(restored.state_dict()) == {"base", "delta.inner.A", "delta.inner.B"}
    assert restored.delta.scale == 0.5


def test_a_map_is_restored_in_the_current_dtype_and_on_the_current_device() -> None:
    structure = Chain(
        Dense(randn(3, 2, seed=0), randn(3, seed=1)), Permutation(torch.arange(2)), randn(2, 4, seed=2)
    ).structure()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            restored = restore(structure)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in restored.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in restored.state_dict().values()} == {"meta"}
    assert restored.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "rank", "n"), [(5, 2, 3), (3, 2, 5), (1, 1, 5), (5, 1, 1)])
def test_structures_made_without_a_map_are_those_of_the_map(m: int, rank: int, n: int, bias: bool) -> None:
    b = torch.zeros(m) if bias else None
    chain = Chain(torch.zeros(m, rank), torch.zeros(rank, n), bias=b)
    assert planned(Rows(), (m, n), rank, bias=bias).structure() == chain.structure()
    assert pivoted_structure(m, rank, n, bias=bias) == pivoted(m, n, rank, 0, bias=bias).structure()


CHAIN = {"map": "chain", "names": ["B", "A"], "parts": [[3, 2], [2, 4]], "bias": False}
PIVOTED = {"map": "pivoted", "shape": [3, 4], "rank": 2, "side": "out", "index": True, "bias": False}


@pytest.mark.parametrize(
    "structure",
    [
        {},
        [],
        None,
        "dense",
        {"map": "unknown"},
        {"map": ["dense"]},
        {"map": "dense", "bias": False},
        {"map": "dense", "shape": [3, 4]},
        {"map": "dense", "shape": [3], "bias": False},
        {"map": "dense", "shape": [3, 4, 5], "bias": False},
        {"map": "dense", "shape": [3, -4], "bias": False},
        {"map": "dense", "shape": ["3", 4], "bias": False},
        {"map": "dense", "shape": [3.5, 4], "bias": False},
        {"map": "dense", "shape": 3, "bias": False},
        {"map": "diagonal", "bias": False},
        {"map": "permutation", "size": "many", "bias": False},
        CHAIN | {"parts": []},
        CHAIN | {"parts": [[3, 2]]},
        CHAIN | {"parts": [[3, 2], [2]]},
        CHAIN | {"parts": [[3, 2], [2, 4, 5]]},
        CHAIN | {"parts": [[3, 2], [3, 4]]},
        CHAIN | {"parts": [[3, 2], {"map": "dense"}]},
        CHAIN | {"parts": None},
        CHAIN | {"names": ["B"]},
        CHAIN | {"names": ["B", "B.A"]},
        CHAIN | {"names": ["B", "forward"]},
        CHAIN | {"names": ["B", "slots"]},
        CHAIN | {"map": "sum"},
        CHAIN | {"map": "scale", "scale": 2.0},
        {"map": "scale", "names": ["inner"], "parts": [[3, 4]], "bias": False},
        {"map": "scale", "names": ["inner"], "parts": [[3, 4]], "bias": False, "scale": "two"},
        PIVOTED | {"rank": 5},
        PIVOTED | {"rank": "two"},
        PIVOTED | {"side": "up"},
        {key: value for key, value in PIVOTED.items() if key != "index"},
    ],
    ids=str,
)
def test_malformed_structures_are_refused(structure: Any) -> None:
    with pytest.raises(ValueError, match="not the structure of a map"):
        restore(structure)


def test_a_refused_structure_is_shown() -> None:
    with pytest.raises(ValueError, match=r"not the structure of a map: \{'map': 'unknown'\}"):
        restore({"map": "unknown"})


def test_default_dtype_is_left_as_it_was() -> None:
    assert torch.get_default_dtype() == torch.float32
    assert restore(Dense(torch.zeros(2, 2, dtype=F64)).structure()).dtype == torch.float32
