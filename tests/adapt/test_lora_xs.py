"""lora_xs: a core between frozen factors; LoRA-SB's core starts as the first update of full training."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapted import adapted, case, trained
from torch import Tensor

import lrc
from lrc.errors import LrcError
from lrc.maps import low_rank, simplify

F64 = torch.float64


def core(fqn: str, rank: int, **options: Any) -> tuple[Any, Any]:
    it = case(F64)
    made = adapted(it, targets=[fqn], method="lora_xs", rank=rank, **options).program.maps[fqn]
    return made, getattr(it.model, fqn).weight.detach()


def factors(made: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, R, A = (p.detach() for p in made.adapter.inner.slots)
    return B, R, A


@pytest.mark.parametrize(("fqn", "rank"), [("tall", 3), ("wide", 8), ("square", 5), ("row", 1), ("column", 1)])
def test_the_factors_are_the_best_approximation_of_the_weight(fqn: str, rank: int) -> None:
    made, W = core(fqn, rank)
    B, R, A = factors(made)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(B @ A, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=0, atol=1e-12)
    assert torch.allclose(B.T @ B, torch.eye(rank, dtype=F64), rtol=0, atol=1e-12)
    delta = made.exact().weight - W
    assert torch.linalg.matrix_norm(delta, 2) <= S[0] * torch.linalg.matrix_norm(R, 2) * (1 + 1e-9)
    assert delta.abs().max() < 1e-4
    assert trained(made) == rank**2


def test_what_it_amounts_to_as_a_lora_of_the_same_rank() -> None:
    made, _ = core("tall", 3, alpha=6.0)
    with torch.no_grad():
        made.adapter.inner.R.add_(torch.randn(3, 3, dtype=F64))
    B, R, A = factors(made)
    lora = low_rank(made.adapter)
    assert lora is not None
    assert lora.scale == 2.0
    assert lora.rank == 3
    assert torch.allclose(lora.B @ lora.A, B @ R @ A, rtol=0, atol=1e-13)
    assert repr(simplify(made.adapter).map) == "Chain(Dense[20,3], Dense[3,8]*)"


def test_the_counts_of_mistral_are_the_papers() -> None:
    made, _ = core("square", 4)
    assert trained(made) == 16
    assert 224 * 96**2 == 2_064_384  # 2.06 M: rank x rank, whatever the layer


@pytest.mark.parametrize("orthonormal", [True, False])
def test_the_gradient_of_the_core_is_the_projected_full_gradient(orthonormal: bool) -> None:
    """g_R = s Bᵀ G Aᵀ; with orthonormal factors and s = 1, B g_R A is the projection of G on their spaces."""
    made, _ = core("tall", 3, alpha=3.0 if orthonormal else 1.5)
    s = made.adapter.scale
    branch = made.adapter.inner
    if orthonormal:
        branch.A.data.copy_(torch.linalg.qr(branch.A.T)[0].T)
    else:
        branch.B.data.copy_(torch.randn(20, 3, dtype=F64))
    x, target = torch.randn(7, 8, dtype=F64), torch.randn(7, 20, dtype=F64)
    (made(x) - target).square().sum().backward()
    full = made.exact().weight.clone().requires_grad_()
    (x @ full.T + made.bias.detach() - target).square().sum().backward()
    G, (B, _, A) = full.grad, factors(made)
    g = branch.R.grad
    assert torch.allclose(g, s * B.T @ G @ A.T, rtol=0, atol=1e-10)
    best = torch.linalg.inv(B.T @ B) @ g @ torch.linalg.inv(A @ A.T) / s**2
    P, Q = B @ torch.linalg.inv(B.T @ B) @ B.T, A.T @ torch.linalg.inv(A @ A.T) @ A
    assert torch.allclose(s * B @ best @ A, P @ G @ Q, rtol=0, atol=1e-10)
    if orthonormal:
        assert torch.allclose(best, g, rtol=0, atol=1e-10)
        before = made.exact().weight
        with torch.no_grad():
            branch.R.sub_(0.25 * g)
        assert torch.allclose(made.exact().weight - before, -0.25 * B @ B.T @ G @ A.T @ A, rtol=0, atol=1e-10)


def test_lora_sb_starts_at_the_best_part_of_the_first_update(tmp_path: Path) -> None:
    x = tiny.mlp_inputs(rows=6)
    model = tiny.mlp()
    data = tmp_path / "calibration.npz"
    import numpy as np

    np.savez(data, x=x.numpy())
    spec = {
        "version": 1,
        "calibration": {"dataset": str(data), "samples": 6},
        "passes": [
            {"type": "adapt", "targets": ["up"], "method": "lora_xs", "rank": 4, "init": {"type": "lora_sb", "step": 0.01}}
        ],
    }
    made = lrc.compile(model, spec, inputs={"x": x})
    adapter = made.program.maps["up"]
    B, R, A = factors(adapter)
    assert torch.allclose(B.T @ B, torch.eye(4), atol=1e-5)
    assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
    assert torch.equal(R, torch.diag(R.diagonal()))
    assert R.diagonal().tolist() == sorted(R.diagonal().tolist(), reverse=True)
    assert R.diagonal().min() >= 0
    shift = (adapter.exact().weight - model.up.weight.double()).float()
    assert shift.abs().max() > 1e-3  # the first step is taken: not the base's output
    D = shift / 0.01
    singular = torch.linalg.svdvals(D)[:4]
    assert torch.allclose(singular, R.diagonal() / 0.01, rtol=1e-3)
    assert trained(adapter) == 16
    assert torch.equal(adapter.base, model.up.weight)  # not compensated


def test_an_initialiser_without_a_core_is_refused() -> None:
    with pytest.raises(LrcError, match="this initialiser makes no core; choose `init: svd_weight`"):
        core("tall", 2, init="kaiming")
