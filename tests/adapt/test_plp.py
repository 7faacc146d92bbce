"""plp: halves of both factors are frozen; two adapters trained apart are put together."""

from typing import Any

import pytest
import torch
from adapted import Case, adapted, case, trained
from lrc_passes.adapters.plp import made as put_together
from torch import Tensor

from lrc.maps import Blocks, LinearMap, low_rank

F64 = torch.float64


def plp(it: Case, fqn: str = "square", rank: int = 4, **options: Any) -> LinearMap:
    return adapted(it, targets=[fqn], method={"type": "plp", **options}, rank=rank).program.maps[fqn]


def blocks(made: Any) -> tuple[Blocks, Blocks]:
    B, A = made.adapter.inner.slots
    return B, A


def steps(made: LinearMap, optimizer: type[torch.optim.Optimizer], seed: int = 0, **options: Any) -> None:
    torch.manual_seed(seed)
    chosen = optimizer([p for p in made.parameters() if p.requires_grad], **options)
    for _ in range(5):
        x = torch.randn(6, made.in_features, dtype=F64)
        chosen.zero_grad()
        (made(x) - torch.randn(6, made.out_features, dtype=F64)).square().mean().backward()
        chosen.step()


@pytest.mark.parametrize(
    ("fqn", "m", "n"), [("square", 20, 20), ("tall", 20, 8), ("wide", 8, 20), ("row", 1, 8), ("column", 8, 1)]
)
def test_half_of_the_rows_and_columns_is_learnt(fqn: str, m: int, n: int) -> None:
    made = plp(case(F64), fqn)
    assert trained(made) == 4 * (n - n // 2) + 4 * (m - m // 2)
    B, A = blocks(made)
    assert (B.first.shape, B.second.shape) == ((m // 2, 4), (m - m // 2, 4))
    assert (A.first.shape, A.second.shape) == ((4, n // 2), (4, n - n // 2))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_halves_stay_bit_for_bit_under_weight_decay_too(decay: float) -> None:
    made = plp(case(F64))
    B, A = blocks(made)
    before = B.first.detach().clone(), A.first.detach().clone(), made.exact().weight
    steps(made, torch.optim.AdamW, lr=0.05, weight_decay=decay)
    assert torch.equal(B.first, before[0])
    assert torch.equal(A.first, before[1])
    change = made.exact().weight - before[2]
    assert torch.equal(change[:10, :10], torch.zeros(10, 10, dtype=F64))
    assert change[10:, 10:].abs().max() > 0
    assert B.first.grad is None


def test_square_weights_have_disjoint_rows_of_one_orthonormal_basis() -> None:
    B, A = blocks(plp(case(F64)))
    basis = torch.cat([A.first.T, B.first])  # with as many rows as features the two halves are all of it
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=F64), rtol=0, atol=1e-6)
    assert B.second.abs().max() == 0
    larger, wider = blocks(plp(case(F64), basis=64))
    both = torch.cat([wider.first.T, larger.first])
    assert torch.linalg.matrix_norm(both, 2) <= 1 + 1e-6


def test_a_square_weight_moves_at_the_start_as_the_authors_have_it_and_stays_where_asked() -> None:
    it = case(F64)
    W = it.model.square.weight.detach()
    delta = plp(it).exact().weight - W
    assert delta[:10].abs().max() > 1e-3
    assert torch.equal(delta[10:], torch.zeros(10, 20, dtype=F64))
    assert torch.allclose(plp(it, zero_init=True).exact().weight, W, rtol=0, atol=1e-12)
    assert torch.equal(plp(it, "tall").exact().weight, it.model.tall.weight)


@pytest.mark.parametrize(("train", "up", "down"), [("both", True, True), ("up", True, False), ("down", False, True)])
def test_one_factor_alone_can_be_trained(train: str, up: bool, down: bool) -> None:
    B, A = blocks(plp(case(F64), train=train))
    assert (B.second.requires_grad, A.second.requires_grad) == (up, down)
    assert not B.first.requires_grad
    assert not A.first.requires_grad


def test_two_adapters_are_made_one_from_their_halves() -> None:
    style, content = plp(case(F64)), plp(case(F64))
    steps(style, torch.optim.SGD, seed=1, lr=0.1)
    steps(content, torch.optim.SGD, seed=2, lr=0.1)
    joined = put_together(style, content)
    (B_s, A_s), (_, A_c), (B, A) = blocks(style), blocks(content), blocks(joined)
    h = 10

    def whole(part: Blocks) -> Tensor:
        return part.matrix().detach()

    assert torch.equal(whole(A)[:, :h], whole(A_s)[:, :h])
    assert torch.equal(whole(A)[:, h:], whole(A_c)[:, h:])
    assert torch.equal(whole(B), whole(B_s))
    assert not torch.equal(whole(A_s), whole(A_c))
    assert torch.equal(put_together(style, style).exact().weight, style.exact().weight)
    assert trained(joined) == trained(style)
    with pytest.raises(ValueError, match="expected an adapter that `method: plp` has made"):
        put_together(style, style.slots[1])
    with pytest.raises(ValueError, match="adapters of other sizes"):
        put_together(style, plp(case(F64), "tall"))


def test_it_is_a_plain_lora() -> None:
    made = plp(case(F64))
    steps(made, torch.optim.SGD, lr=0.1)
    B, A = blocks(made)
    lora = low_rank(made.slots[1])
    assert lora is not None
    assert torch.equal(lora.B, B.matrix())
    assert torch.equal(lora.A, A.matrix())


def test_a_basis_that_is_too_small_is_a_reason_to_keep_the_weight() -> None:
    made = adapted(case(), targets=["square"], method={"type": "plp", "basis": 15}, rank=4)
    assert made.plan.decisions[0].keep == "a basis of 15 rows has no two disjoint halves of 20 features"
    made = adapted(case(), targets=["square"], method="plp", rank=64)
    assert made.plan.decisions[0].keep == "a basis of 20 rows has no 64 orthonormal columns"
