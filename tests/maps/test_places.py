"""Pick and Spread: features at their places, and chains without them."""

import pytest
import torch
from random_maps import F64, randn

from lrc.maps import Chain, Dense, LinearMap, Pick, Spread, pick_of, restore, spread_of, without_pick, without_spread

PLACES = torch.tensor([0, 2, 5])


@pytest.mark.parametrize("made", [Pick(PLACES, 7, F64), Spread(PLACES, 7, F64)])
def test_what_is_applied_is_the_matrix_that_the_map_stands_for(made: LinearMap) -> None:
    x = randn(2, 3, made.in_features, seed=0)
    assert torch.equal(made(x), x @ made.exact().weight.T)
    assert made.cost().parameters == made.cost().flops == 0
    assert made.cost().bytes == 4 * (3 if isinstance(made, Pick) else 7)
    again = restore(made.structure())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.float()(x.float()), made(x).float())
    assert torch.equal(again.places(), PLACES)


def test_spread_and_pick_at_the_same_places_undo_each_other() -> None:
    x = randn(4, 3, seed=1)
    assert torch.equal(Pick(PLACES, 7)(Spread(PLACES, 7)(x)), x)


def test_a_chain_without_its_places_is_narrower_and_keeps_its_bias() -> None:
    W, b, V, c = randn(3, 5, seed=0), randn(3, seed=1), randn(4, 3, seed=2), randn(4, seed=3)
    writer, reader = Chain(Spread(PLACES, 7, F64), Dense(W, b)), Chain(V, Pick(PLACES, 7, F64), bias=c)
    assert spread_of(writer) is writer.slots[0]
    assert pick_of(reader) is reader.slots[-1]
    assert spread_of(reader) is pick_of(writer) is None
    x = randn(6, 5, seed=4)
    narrow = without_pick(reader)(without_spread(writer)(x))
    assert torch.allclose(narrow, reader(writer(x)))
    assert without_spread(writer).out_features == without_pick(reader).in_features == 3
