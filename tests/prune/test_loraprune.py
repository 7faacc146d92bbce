"""LoRAPrune: the invariants of its numbers, and pruning inside training that ends in smaller modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import group_of
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.program.dependency import find_groups
from lrc.solvers.lora_guided import guided_entries, guided_gradient, kept_units, pruned_share


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


class Mlps(nn.Module):
    """Residual blocks with a gated MLP each."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.up, self.gate, self.down = (
            nn.ModuleList(nn.Linear(*shape) for _ in range(blocks)) for shape in ((8, 12), (8, 12), (12, 8))
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            x = x + down(up(x) * torch.sigmoid(gate(x)))
        return self.head(x)


def mlps() -> Mlps:
    torch.manual_seed(0)
    return Mlps().eval()


def trained(recipe: dict[str, Any], *, steps: int = 20, adapt: Any = "{up,gate,down}.*", then: Any = ()) -> lrc.Compiled:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    passes = [
        {"type": "adapt", "targets": [adapt], "method": "lora", "rank": 3, "alpha": 6},
        {"type": "train", "objective": "distillation", "steps": steps, "batch_size": 8, "recipe": recipe},
        *then,
    ]
    return lrc.compile(mlps(), {"version": 1, "passes": passes}, inputs=[x[:4]], calibration=[(x,)], cache=Path("cache"))


def test_the_gradient_estimate_is_the_change_of_the_product() -> None:
    g = torch.Generator().manual_seed(0)
    A, gA = (torch.randn(3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    B, gB = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(guided_gradient(A, B, gA, gB), B @ A - (B - gB) @ (A - gA), rtol=0, atol=1e-6)


def test_with_a_whole_basis_the_estimate_is_the_gradient() -> None:
    """A orthonormal, B zero: dL/dB = G Aᵀ, so gB A = G."""
    A = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    G = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(guided_gradient(A, torch.zeros(4, 6).double(), torch.zeros(6, 6).double(), G @ A.T), G)


def test_scores_are_zero_for_zero_weights_and_follow_no_order_of_inputs() -> None:
    W, G = torch.randn(4, 6), torch.randn(4, 6)
    W[2] = 0
    sums = guided_entries(W, G, 2).sum(1)
    assert sums[2] == 0
    order = torch.randperm(6)
    torch.testing.assert_close(guided_entries(W[:, order], G[:, order], 2).sum(1), sums)


def test_the_schedule_rises_as_a_cubic_from_the_first_share_to_the_last() -> None:
    shares = [pruned_share(t, 100, initial=0.1, final=0.5, warmup=0.1, cooldown=0.1) for t in range(101)]
    assert shares[0] == shares[10] == 0.1
    assert shares[90] == shares[100] == 0.5
    assert shares == sorted(shares)
    middle = pruned_share(50, 100, initial=0.0, final=0.5, warmup=0.1, cooldown=0.1)
    assert middle == pytest.approx(0.875 * 0.5)


def test_what_is_out_stays_out() -> None:
    mask = kept_units(torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.ones(4, dtype=torch.bool), 1)
    assert mask.tolist() == [True, False, True, True]
    mask = kept_units(torch.tensor([0.3, 9.0, 0.2, 0.4]), mask, 2)
    assert mask.tolist() == [True, False, False, True]


def test_training_ends_in_narrower_modules_that_merge() -> None:
    recipe = {"type": "loraprune", "width_kept": 0.5, "every": 2, "skip_first": 0.0, "skip_last": 1}
    done = trained(recipe, then=[{"type": "merge"}])
    widths = [done.program.sites[f"up.{i}"].out_features for i in range(3)]
    assert widths == [6, 6, 12]
    assert [done.program.sites[f"gate.{i}"].out_features for i in range(3)] == widths
    assert done.program.sites["down.0"].map.in_features == 6
    assert any("up.0: 6 of 12 features stay" in note for note in done.plan.notes)
    assert repr(done.program.sites["up.0"].map).startswith("Dense[6,8]")
    x = torch.randn(5, 6)
    torch.testing.assert_close(done.module(x), done.graft()(x), rtol=0, atol=1e-6)


def test_the_cut_module_is_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop judged last, with masks, is what stands there afterwards."""
    from lrc.train.recipes.loraprune import GuidedPruning

    x = torch.randn(5, 6)
    seen = {}
    finish = GuidedPruning.finish

    def kept(self: GuidedPruning) -> list[str]:
        with torch.no_grad():
            seen["masked"] = self.program(x)["output"]
        assert sorted(int(mask.sum()) for mask in self.masks.values()) == [6, 6]
        return finish(self)

    monkeypatch.setattr(GuidedPruning, "finish", kept)
    done = trained({"type": "loraprune", "width_kept": 0.5, "every": 3, "skip_first": 0.0})
    with torch.no_grad():
        torch.testing.assert_close(done.program(x)["output"], seen["masked"], rtol=0, atol=1e-6)
    groups = find_groups(done.program)
    assert group_of(groups, "up.0").units == 6


def test_without_adapters_on_all_linears_of_a_group_it_is_refused() -> None:
    with pytest.raises(UsageError, match="all of whose linears have a trained low-rank adapter"):
        trained({"type": "loraprune", "width_kept": 0.5}, adapt="up.*")
