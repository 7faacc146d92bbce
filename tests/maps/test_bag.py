"""Bags as maps: the sum or mean of looked-up rows, of a table with fewer columns and a matrix after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.maps import Bag, Bags, Chain, fold, planned, restore, simplify
from lrc.maps.bag import entries_of

FLAT = torch.tensor([0, 3, 8, 8, 1, 3, 3, 0, 5])
STARTS = torch.tensor([0, 2, 2, 6])  # the second bag is empty
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.3, 0.1, 0.7, 1.5, 2.5])
SQUARE = FLAT.reshape(3, 3)

CASES: list[tuple[dict[str, Any], tuple[Tensor, ...]]] = [
    ({"mode": "sum"}, (SQUARE,)),
    ({"mode": "mean"}, (SQUARE,)),
    ({"mode": "mean", "padding_idx": 3}, (SQUARE,)),
    ({"mode": "sum", "padding_idx": 8}, (SQUARE,)),
    ({"mode": "sum"}, (SQUARE, None, WEIGHTS.reshape(3, 3))),  # type: ignore[dict-item]
    ({"mode": "sum"}, (FLAT, STARTS)),
    ({"mode": "mean"}, (FLAT, STARTS)),
    ({"mode": "mean", "padding_idx": 3}, (FLAT, STARTS)),
    ({"mode": "sum", "padding_idx": 3}, (FLAT, STARTS, WEIGHTS)),
    ({"mode": "sum", "include_last_offset": True}, (FLAT, torch.cat([STARTS, torch.tensor([9])]), WEIGHTS)),
]


def layout_of(options: dict[str, Any]) -> Bags:
    return Bags(options.get("padding_idx"), options["mode"], options.get("include_last_offset", False))


@pytest.mark.parametrize(("options", "given"), CASES)
def test_a_bag_is_the_module_and_the_product_with_its_entries(options: dict[str, Any], given: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingBag(9, 5, **options)
    expected = module(*given)
    layout = layout_of(options)
    made = layout.original(module.weight, None)
    assert torch.equal(made(*given), expected)
    x, offsets, weights = (*given, None, None)[:3]
    if offsets is None:
        assert isinstance(made, Bag)
        assert torch.allclose(made._added(x, weights), expected, atol=1e-6)  # what is exported
    found = layout.entries(x, 9, {"offsets": offsets, "per_sample_weights": weights})  # type: ignore[dict-item]
    counts = torch.zeros(found.number, 9, dtype=torch.float64)
    counts[found.bags, found.indices] = found.values  # at most once each
    assert torch.allclose(counts @ made.exact().weight.T, expected.double(), atol=1e-6)
    assert len(torch.unique(found.bags * 9 + found.indices)) == len(found.indices)


@pytest.mark.parametrize(("options", "given"), CASES)
def test_a_product_adds_fewer_numbers_and_multiplies_them(options: dict[str, Any], given: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    B, A, bias = torch.randn(5, 2), torch.randn(2, 9), torch.randn(5)
    layout = layout_of(options)
    made = layout.product(B, A, bias)
    dense = layout.original((B @ A).T.contiguous(), None)
    assert torch.allclose(made(*given), dense(*given) + bias, atol=1e-5)
    assert made.cost(1).parameters == 2 * 9 + 2 * 5 + 5
    assert repr(made) == "Chain(Dense[5,2], Bag[9,2])"
    assert simplify(made).map is made
    folded = fold(made)
    assert isinstance(folded, Bag)
    assert torch.allclose(folded(*given), made(*given), atol=1e-5)
    names = ("offsets", "per_sample_weights")
    assert torch.equal(made(given[0], **dict(zip(names, given[1:], strict=False))), made(*given))


def test_structures_restore_what_they_were_made_of() -> None:
    made = planned(Bags(4, "sum", last_offset=True), (5, 9), 2, bias=True)
    assert isinstance(made, Chain)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    restored = restore(made.structure())
    restored.load_state_dict(made.state_dict())
    given = (FLAT, torch.cat([STARTS, torch.tensor([9])]))
    assert torch.equal(restored(*given), made(*given))
    assert restored.structure() == made.structure()
    assert restore(fold(made).structure()).structure() == fold(made).structure()


def test_a_maximum_is_no_product() -> None:
    assert Bags(None, "max").obstacle() == "the maximum over a bag is no product with a matrix"
    assert Bags(None, "sum").obstacle() is None
    module = nn.EmbeddingBag(9, 5, mode="max")
    assert torch.equal(Bags(None, "max").original(module.weight, None)(SQUARE), module(SQUARE))


def test_a_row_that_a_bag_has_twice_is_one_entry() -> None:
    x, starts = torch.tensor([4, 4, 1, 4]), torch.tensor([0, 3])
    found = entries_of(x, starts, None, rows=9, mode="mean", padding_index=None, last_offset=False)
    assert [t.tolist() for t in found[:3]] == [[1, 4, 4], [0, 0, 1], [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]]
