"""Embeddings as maps: rows of a table, and of a table with fewer columns and a matrix after it."""

import torch
from torch import nn

from lrc.maps import Chain, Indices, Lookup, fold, planned, restore, simplify

IDS = torch.tensor([[0, 3, 8], [8, 1, 0]])


def test_a_lookup_is_the_embedding_and_the_product_with_one_hot_vectors() -> None:
    torch.manual_seed(0)
    module = nn.Embedding(9, 5, padding_idx=3)
    made = Indices(3).original(module.weight, None)
    assert torch.equal(made(IDS), module(IDS))
    one_hot = nn.functional.one_hot(IDS, 9).double()
    assert torch.allclose(one_hot @ made.exact().weight.T, module(IDS).double())
    assert (made.in_features, made.out_features) == (9, 5) == module.weight.shape
    assert made.cost(7).flops == 0
    assert repr(made) == "Lookup[9,5]"


def test_a_product_looks_up_fewer_numbers_and_multiplies_them() -> None:
    torch.manual_seed(0)
    B, A, bias = torch.randn(5, 2), torch.randn(2, 9), torch.randn(5)
    made = Indices().product(B, A, bias)
    assert torch.allclose(made(IDS), (B @ A).T[IDS] + bias, atol=1e-6)
    assert made.cost(1).parameters == 2 * 9 + 2 * 5 + 5
    assert made.cost(4).flops == 4 * (2 * 10 + 5)
    assert repr(made) == "Chain(Dense[5,2], Lookup[9,2])"
    assert simplify(made).map is made
    folded = fold(made)
    assert isinstance(folded, Lookup)
    assert torch.allclose(folded(IDS), made(IDS), atol=1e-6)


def test_structures_restore_what_they_were_made_of() -> None:
    made = planned(Indices(4), (5, 9), 2, bias=True)
    assert isinstance(made, Chain)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    restored = restore(made.structure())
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored(IDS), made(IDS))
    assert restored.structure() == made.structure()
    assert restore(fold(made).structure()).structure() == fold(made).structure()
