"""What an adapter amounts to as a plain LoRA, read off its map."""

import pytest
import torch
from random_maps import F64, order_of, randn

from lrc.maps import (
    Blocks,
    Bottleneck,
    Chain,
    Conv,
    Dense,
    Diagonal,
    Gate,
    Geometry,
    LinearMap,
    Lookup,
    Permutation,
    Scale,
    Sum,
    Triangular,
    low_rank,
)

LDU = Chain(
    Permutation(order_of(7, 0), F64),
    Triangular.of(randn(7, 3, seed=1)),
    Sum(Diagonal(randn(3, seed=2)), Diagonal(randn(3, seed=3))),
    Triangular.of(randn(3, 5, seed=4), upper=True),
)
CLOSED = Gate(torch.tensor([1.5, 0.0, -2.0, 0.0], dtype=F64))
BRANCHES: dict[str, tuple[LinearMap, int]] = {
    "lora": (Scale(Chain(randn(7, 3, seed=0), randn(3, 5, seed=1)), 0.5), 3),
    "lora_xs": (Scale(Chain(randn(7, 3, seed=0), randn(3, 3, seed=1), randn(3, 5, seed=2)), 2.0), 3),
    "sora": (Scale(Chain(randn(7, 4, seed=0), CLOSED, randn(4, 5, seed=1)), 4.0), 2),
    "loldu": (Scale(LDU, 0.25), 3),
    "plp": (
        Chain(Blocks(randn(3, 2, seed=0), randn(4, 2, seed=1), "out"), Blocks(randn(2, 2, seed=2), randn(2, 3, seed=3), "in")),
        2,
    ),
    "flora": (Chain(randn(7, 4, seed=0), randn(4, 2, seed=1), randn(2, 5, seed=2)), 2),
    "two of them": (
        Sum(Scale(Chain(randn(7, 1, seed=0), randn(1, 5, seed=1)), 3.0), Chain(randn(7, 2, seed=2), randn(2, 5, seed=3))),
        3,
    ),
    "a convolution": (Chain(Conv(randn(7, 2, 1, seed=0), Geometry.unit(1)), Conv(randn(2, 4, 3, seed=1), Geometry.unit(1))), 2),
    "an embedding": (Chain(randn(7, 2, seed=0), Diagonal(randn(2, seed=1)), Lookup(randn(9, 2, seed=2))), 2),
    "with a bias": (
        Scale(Chain(Dense(randn(7, 2, seed=0), randn(7, seed=1)), Dense(randn(2, 5, seed=2), randn(2, seed=3))), 3.0),
        2,
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_the_factors_stand_for_the_same_weight_and_bias(name: str) -> None:
    made, rank = BRANCHES[name]
    found = low_rank(made)
    assert found is not None
    assert found.rank == rank
    weight, bias = made.exact()
    assert torch.allclose(found.scale * found.B @ found.A, weight, rtol=0, atol=1e-12)
    assert (found.bias is None) == (bias is None)
    assert bias is None or torch.allclose(found.bias, bias)


def test_what_is_no_product_has_no_factors() -> None:
    bent = Bottleneck(randn(4, 1, seed=0), randn(1, 4, seed=1))
    for made in (
        Dense(randn(4, 4, seed=0)),
        bent,
        Sum(randn(4, 4, seed=0), Chain(randn(4, 1, seed=1), randn(1, 4, seed=2))),
    ):
        assert low_rank(made) is None
