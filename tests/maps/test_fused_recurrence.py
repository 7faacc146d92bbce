"""torch's own recurrent operators on multiplied-out maps: the states of the loop, both ways in time, in every form of a map."""

from typing import Any

import pytest
import torch
from random_maps import F64, pivoted, randn

from lrc.maps import Chain, Dense, LinearMap, Scale
from lrc.maps.fused_recurrence import SMALL, fused, is_small, parted, stands, whole
from lrc.maps.recurrence import GATES, Cell, Kind

IN, HIDDEN, RANK = 5, 4, 2
FORMS = ["chain", "pivoted", "scale", "dense"]


def map_of(form: str, rows: int, columns: int, seed: int) -> LinearMap:
    bias = randn(rows, seed=seed + 9)
    chain = Chain(randn(rows, RANK, seed=seed), randn(RANK, columns, seed=seed + 1), bias=bias)
    made: dict[str, LinearMap] = {
        "chain": chain, "pivoted": pivoted(rows, columns, RANK, seed), "scale": Scale(chain, 0.5),
        "dense": Dense(randn(rows, columns, seed=seed), bias),
    }  # fmt: skip
    return made[form].eval()


@pytest.mark.parametrize("kind", list(GATES))
@pytest.mark.parametrize(("batch_first", "reverse"), [(True, False), (False, True)])
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_gives_the_states_of_the_loop(kind: Kind, batch_first: bool, reverse: bool, form: str) -> None:
    cell, rows = Cell(kind, batch_first, reverse), GATES[kind] * HIDDEN
    inputs, states = map_of(form, rows, IN, 0), map_of(form, rows, HIDDEN, 20)
    x = randn(*((3, 6) if batch_first else (6, 3)), IN, seed=40)
    start: list[Any] = [randn(3, HIDDEN, seed=41 + i) for i in range(2 if kind == "lstm" else 1)]
    wanted = cell.run(states, inputs(x), *start)
    for a, b in zip(fused(cell, x, inputs, states, *start), wanted, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_map_is_multiplied_out_with_its_bias(form: str) -> None:
    made = map_of(form, 8, HIDDEN, 3)
    for found, wanted in zip(whole(made), made.exact(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_factors_of_the_inputs_stay_two() -> None:
    made, x = map_of("chain", 8, IN, 3), randn(2, IN, seed=5)
    inner, weight, bias = parted(made, x)
    assert inner.shape == (2, RANK)
    assert weight is made.slots[0]
    assert torch.allclose(inner @ weight.T + bias, made(x), atol=1e-12)


def test_what_is_large_or_trained_is_a_loop() -> None:
    rows = 2048
    assert rows * rows // 4 > SMALL
    large = Chain(torch.zeros(rows, 2), torch.zeros(2, rows // 4)).eval()
    assert not is_small(large)
    assert is_small(Dense(torch.zeros(rows, rows // 4)))  # no factors: the operator reads what is there
    small = map_of("chain", 8, HIDDEN, 0)
    assert is_small(small)
    assert not stands(small.train())
    assert small.dtype == F64
