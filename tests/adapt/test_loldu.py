"""loldu: pivots of the weight's own decomposition are trained, and nothing moves before they do."""

from typing import Any

import pytest
import torch
from adapted import adapted, case, distance, train, trained

from lrc.maps import LinearMap, low_rank, simplify
from lrc.solvers.ldu import ldu

F64 = torch.float64


def loldu(fqn: str, rank: int, alpha: float = 1.0, **options: Any) -> LinearMap:
    made = adapted(case(F64), targets=[fqn], method={"type": "loldu", **options}, rank=rank, alpha=alpha)
    return made.program.maps[fqn]


@pytest.mark.parametrize(
    ("fqn", "most"), [("tall", 8), ("wide", 8), ("square", 20), ("row", 1), ("column", 1), ("conv", 6), ("table", 8)]
)
def test_any_rank_starts_at_the_weight_itself(fqn: str, most: int) -> None:
    for rank in {1, most}:
        made = loldu(fqn, rank)
        assert trained(made) == rank
        assert torch.equal(made.exact().weight, made.slots[0].exact().weight if fqn in ("conv", "table") else made.base)


@pytest.mark.parametrize("fqn", ["tall", "wide", "square"])
def test_all_pivots_at_zero_leave_nothing_of_the_weight(fqn: str) -> None:
    """W - P L diag(d) U is what the authors keep as their residual; with every pivot and scale 1 it is zero."""
    made = loldu(fqn, 8 if fqn != "square" else 20, alpha=8.0 if fqn != "square" else 20.0, z_init="zeros")
    assert made.exact().weight.abs().max() < 1e-13


def test_the_update_is_the_sum_over_changed_pivots() -> None:
    it = case(F64)
    made = adapted(it, targets=["square"], method="loldu", rank=5, alpha=10.0).program.maps["square"]
    W = it.model.square.weight.detach()
    found = ldu(W, 5)
    L = found.L[found.order.argsort()]
    z = found.d.clone()
    z[[1, 3]] += torch.tensor([0.5, -2.0], dtype=F64)
    made.adapter.inner.D.z.diagonal.data.copy_(z)
    expected = 2.0 * (L * (z - found.d)) @ found.U
    delta = made.exact().weight - W
    assert torch.allclose(delta, expected, rtol=0, atol=1e-13)
    assert torch.linalg.matrix_rank(delta) == 2
    x = torch.randn(4, 20, dtype=F64)
    assert torch.allclose(made(x), x @ (W + expected).T + it.model.square.bias, rtol=0, atol=1e-12)
    lora = low_rank(made.slots[1])
    assert lora is not None
    assert lora.rank == 5
    assert torch.allclose(lora.scale * lora.B @ lora.A, expected, rtol=0, atol=1e-13)
    assert torch.allclose(simplify(made).map.exact().weight, W + expected, rtol=0, atol=1e-13)


def test_the_gradient_of_a_pivot_is_the_closed_form() -> None:
    it = case(F64)
    made = adapted(it, targets=["tall"], method="loldu", rank=4, alpha=2.0).program.maps["tall"]
    x = torch.randn(6, 8, dtype=F64)
    made(x).square().sum().backward()
    G = 2 * made(x).detach().T @ x
    found = ldu(it.model.tall.weight, 4)
    L = found.L[found.order.argsort()]
    expected = torch.stack([0.5 * L[:, i] @ G @ found.U[i] for i in range(4)])
    assert torch.allclose(made.adapter.inner.D.z.diagonal.grad, expected, rtol=1e-10)


@pytest.mark.parametrize("start", ["uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"])
def test_other_starts_change_the_weight_by_the_difference_of_the_pivots(start: str) -> None:
    it = case(F64)
    made = adapted(it, targets=["square"], method={"type": "loldu", "z_init": start}, rank=6, alpha=6.0).program.maps["square"]
    found = ldu(it.model.square.weight, 6)
    z, m = made.adapter.inner.D.z.diagonal.detach(), found.d.mean()
    L = found.L[found.order.argsort()]
    delta = made.exact().weight - it.model.square.weight
    assert torch.allclose(delta, (L * (z - found.d)) @ found.U, rtol=0, atol=1e-12)
    checks = {
        "uniform": z.abs().max() <= m.abs() / 2, "s_uniform": z.abs().max() <= 1, "constant": torch.allclose(z, m.expand(6)),
        "ones": bool((z == 1).all()), "zeros": bool((z == 0).all()),
    }  # fmt: skip
    assert checks.get(start, len(set(z.tolist())) == 6)


def test_a_weight_that_lacks_rank_is_adapted_without_a_division_by_nothing() -> None:
    it = case()
    with torch.no_grad():
        it.model.square.weight.copy_(torch.randn(20, 3) @ torch.randn(3, 20))
    made = adapted(it, targets=["square"], method="loldu", rank=10)
    before = it.model(**it.inputs)
    assert "Triangular[10,20; upper]" in repr(made.program.maps["square"])
    assert distance(made.module(**it.inputs), before) < 1e-6
    train(made.program)
    assert all(y.isfinite().all() for y in made.module(**it.inputs))


def test_factors_are_stored_as_triangles_and_an_index() -> None:
    made = loldu("tall", 8)
    branch = made.slots[1].slots[0]
    P, L, _, U = branch.slots
    assert P.cost().bytes == 4 * 20
    assert L.cost().parameters == 20 * 8 - 8 * 9 // 2
    assert U.cost().parameters == 8 * 8 - 8 * 9 // 2


def test_more_pivots_than_there_are_is_a_reason_to_keep_the_weight() -> None:
    made = adapted(case(), targets=["row"], method="loldu", rank=2)
    assert "has 1 pivots, and rank 2 was asked for" in str(made.plan.decisions[0].keep)


def test_a_trained_scale_is_that_of_the_pivots_and_not_of_what_they_replace() -> None:
    """W + P L (s diag(z) - s0 diag(d)) U: the authors' residual holds the scale of the start, W - s0 P L diag(d) U."""
    it = case(F64)
    method = {"type": "loldu", "train_scale": True}
    made = adapted(it, targets=["square"], method=method, rank=5, alpha=10.0).program.maps["square"]
    assert trained(made) == 5 + 1
    named = dict(made.named_parameters())
    (scale,) = (p for name, p in named.items() if name.endswith("scalar"))
    (z,) = (p for name, p in named.items() if p.requires_grad and p is not scale)
    assert scale.tolist() == [2.0]
    W, found = it.model.square.weight.detach(), ldu(it.model.square.weight, 5)
    assert torch.equal(made.exact().weight, W)
    L = found.L[found.order.argsort()]
    with torch.no_grad():
        scale.fill_(-0.5)
        z.add_(torch.arange(5.0, dtype=F64))
    residual = W - 2.0 * (L * found.d) @ found.U
    expected = residual - 0.5 * (L * z.detach()) @ found.U
    assert torch.allclose(made.exact().weight, expected, rtol=0, atol=1e-12)
    assert torch.allclose(simplify(made).map.exact().weight, expected, rtol=0, atol=1e-12)
