"""The first step of training an adapter against the first step of full training, on a model, by autograd and torch.linalg."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.initialisers import Start
from lrc.spec.registry import INITIALISERS

SITE = "model.layers.0.self_attn.q_proj"
RANK = 3


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 40, (2, 9), generator=generator) for _ in range(2)]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


@pytest.fixture(scope="module")
def captured(llama: Any) -> Any:
    return lrc.capture(str(llama))


def full_gradient(model: nn.Module, name: str) -> Tensor:
    """The mean over batches of the gradient of the model's own loss, by autograd alone."""
    twin: Any = copy.deepcopy(model).float().eval()
    twin.requires_grad_(True)
    total = torch.zeros_like(twin.get_submodule(name).weight)
    for batch in batches():
        twin.zero_grad()
        twin(**batch, labels=batch["input_ids"]).loss.backward()
        total += twin.get_submodule(name).weight.grad / len(batches())
    return total.double()


def adapted(captured: Any, **options: Any) -> Any:
    passes = [{"type": "adapt", "targets": [SITE], "rank": RANK, **options}]
    return lrc.compile(captured.clone(), {"version": 1, "passes": passes}, calibration=batches())


def best(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def loss_of(program: Any) -> Tensor:
    """The same loss, of the program's graph."""
    total = torch.zeros(())
    for batch in batches():
        logits = program(**batch)["logits"][:, :-1]
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()) / len(batches())
    return total


def test_one_step_of_lora_ga_moves_the_weight_along_the_best_approximation_of_the_full_gradient(captured: Any) -> None:
    G = full_gradient(captured.origin.model, SITE)
    made = adapted(captured, alpha=6.0, init={"type": "lora_ga", "scale": "unit", "niter": 20})
    held, s = made.program.maps[SITE], 2.0
    before = held.exact().weight
    assert torch.allclose(before, captured.originals[f"{SITE}.weight"].double(), atol=1e-6)
    loss_of(made.program).backward()
    A, B = held.adapter.inner.A, held.adapter.inner.B
    wanted = best(G, 2 * RANK)
    errors = []
    for step in (1e-1, 1e-2):
        with torch.no_grad():
            moved = s * (
                (B.double() - step * B.grad.double()) @ (A.double() - step * A.grad.double()) - B.double() @ A.double()
            )
        errors.append(float((moved + step * s**2 * wanted).norm() / (step * s**2 * wanted.norm())))
    assert errors[0] < 0.05
    assert errors[1] < 0.2 * errors[0]  # the rest is of the order of the step
    assert float((G - wanted).norm() / G.norm()) > 0.05  # and the full gradient is not of this rank itself


def test_one_step_on_the_core_of_lora_sb_is_the_projected_step_of_full_training(captured: Any) -> None:
    made = adapted(captured, method="lora_xs", init={"type": "lora_sb", "step": 1e-3, "niter": 30})
    held = made.program.maps[SITE]
    B, R, A = held.adapter.inner.slots
    first = -1e-3 * full_gradient(captured.origin.model, SITE).sign()
    error = (first - (B.double() @ R.double() @ A.double()).detach()).square().sum()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(first)[RANK:].square().sum()), rel=1e-3)
    tuned = copy.deepcopy(captured.origin.model)
    with torch.no_grad():
        tuned.get_submodule(SITE).weight.copy_(held.exact().weight)
    G = full_gradient(tuned, SITE)  # at the start of training, which is one step on
    loss_of(made.program).backward()
    size = float(G.norm())
    assert torch.allclose(R.grad.double(), B.double().T @ G @ A.double().T, atol=1e-5 * size)
    moved = B.double() @ R.grad.double() @ A.double()
    assert torch.allclose(moved, B.double() @ B.double().T @ G @ A.double().T @ A.double(), atol=1e-5 * size)


def test_an_update_of_low_rank_is_taken_whole_by_lora_sb() -> None:
    signs = torch.outer(torch.tensor([1.0, -1, 1, 1, -1]), torch.tensor([1.0, 1, -1, -1, 1, 1, 1]))
    rule = INITIALISERS.get("lora_sb")
    start = Start(lambda: torch.zeros(5, 7), (5, 7), 2, 1.0, "linear", torch.Generator().manual_seed(0), gradient=3 * signs)
    found: Any = rule(start, rule.options(step=0.01))
    assert torch.allclose(found.B @ found.core @ found.A, -0.01 * signs, atol=1e-7)
    assert not found.notes


@pytest.mark.parametrize("name", ["lora_ga", "lora_ga_hf", "lora_sb"])
def test_a_weight_without_a_gradient_starts_plainly_with_a_note(name: str) -> None:
    rule = INITIALISERS.get(name)
    W = torch.randn(6, 8)
    start = Start(W.clone, (6, 8), 2, 2.0, "linear", torch.Generator().manual_seed(0), gradient=torch.zeros(6, 8))
    found: Any = rule(start, rule.options())
    change = found.B @ (found.A if found.core is None else found.core @ found.A)
    assert torch.equal(change, torch.zeros(6, 8))
    assert found.base is None
    assert not found.subtracted
    assert "no gradient on the calibration data" in found.notes[0]
