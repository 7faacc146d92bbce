"""Norms that methods train along: named under `also` of the training pass, they move, and so do the adapters; nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc

METHODS: dict[str, Any] = {
    "sora": {"method": "sora", "rank": 3},
    "colora": {"method": "colora", "rank": 3},
    "compacter": {"method": {"type": "compacter", "n": 2, "rule_std": 0.5}, "rank": 4},
    "hydra": {"method": {"type": "hydra", "train_scale": True}, "rank": 2},
}


class Normed(nn.Module):
    """Two linears with a norm between them, and a head that nothing adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(torch.tanh(self.norm(self.a(x)))))
        return y


@pytest.mark.parametrize("method", METHODS)
def test_norms_and_adapters_move_and_the_rest_does_not(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(32, 6)
    batches = [{"x": x, "labels": torch.sin(x @ torch.randn(6, 4))}]
    program = lrc.capture(model, {"x": x[:2]})
    adapt = {"type": "adapt", "targets": ["{a,b}"], **METHODS[method]}
    train = {
        "type": "train", "objective": "regression", "optimizer": {"type": "adamw", "lr": 0.02}, "steps": 12, "batch_size": 16,
        "also": ["norm.*"],
    }  # fmt: skip
    start = lrc.compile(program.clone(), {"version": 1, "passes": [adapt]}).program
    made = lrc.compile(program.clone(), {"version": 1, "passes": [adapt, train]}, calibration=batches, cache=tmp_path)
    old, new = start.tensors(), made.program.tensors()
    assert set(old) == set(new)
    moved = {name for name in new if not torch.equal(old[name], new[name])}
    trained = {name for name, tensor in old.items() if tensor.requires_grad and name.startswith(("a.", "b."))}
    assert moved == trained | {"norm.weight", "norm.bias"}
    for fqn in ("a", "b"):  # a rule that both share too
        now = made.program.maps[fqn].state_dict()
        for name, p in start.maps[fqn].named_parameters(remove_duplicate=False):
            assert torch.equal(p, now[name]) != p.requires_grad, (fqn, name)
    assert {"head.weight", "head.bias"} <= set(new) - moved
    losses = [row["loss"] for row in made.training[0]["history"]]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
