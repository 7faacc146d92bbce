"""A weight that a head multiplies and an embedding looks up, in one set of matrices."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lrc.maps import Chain, Dense, Lookup, Pivoted, SharedLookup, looked_up, restore

IDS = torch.tensor([[0, 3, 8], [8, 1, 0]])


@pytest.mark.parametrize("inner", [(), (3,)])
def test_rows_of_a_chain_are_looked_up_with_its_own_parameters(inner: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sizes = (9, 4, *inner, 5)
    head = Chain(*(torch.randn(a, b) for a, b in pairwise(sizes)), bias=torch.randn(9))
    table = looked_up(head)
    assert isinstance(table, SharedLookup)
    weight = head.dense().weight
    assert torch.allclose(table(IDS), weight[IDS], atol=1e-5)
    assert torch.allclose(table.dense().weight, weight.T)
    assert torch.allclose(table.weight, weight)
    assert {id(p) for p in table.parameters()} == {id(p) for name, p in head.named_parameters() if name != "bias"}
    assert set(dict(table.named_parameters())) == set(head.names)
    assert (table.in_features, table.out_features) == (9, 5)
    inside = sum(a * b for a, b in pairwise(sizes[1:]))
    assert (table.cost().parameters, table.cost(3).flops) == (9 * 4 + inside, 6 * inside)
    assert repr(table) == f"SharedLookup[{','.join(map(str, sizes))}]"
    restored = restore(table.structure())
    restored.load_state_dict(table.state_dict())
    assert torch.equal(restored(IDS), table(IDS))


def test_rows_of_a_dense_head_are_those_of_its_weight() -> None:
    head = Dense(torch.randn(9, 5), torch.randn(9))
    table = looked_up(head)
    assert isinstance(table, Lookup)
    assert table.table is head.weight
    assert torch.equal(table(IDS), nn.functional.embedding(IDS, head.weight))


def test_a_map_whose_rows_cannot_be_read_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no row of Pivoted\[.*\] can be looked up"):
        looked_up(Pivoted(torch.randn(2, 5), torch.randn(7, 2), torch.arange(9), "out"))
