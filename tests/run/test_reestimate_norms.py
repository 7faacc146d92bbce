"""reestimate_norms: batch norms get the statistics of what they read now, in every view."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrc

AGAIN = {"type": "reestimate_norms"}


class Normed(nn.Module):
    """Two convolutions with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.next, self.last = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.last(self.next(h))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Normed().eval().requires_grad_(False)


@pytest.fixture
def items() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": 2 * torch.randn(size, 3, 9, 9) + 1} for size in (16, 7)]


def again(model: nn.Module, items: list[dict[str, Tensor]], *passes: object) -> lrc.Compiled:
    return lrc.compile(model, {"version": 1, "passes": [*passes, AGAIN]}, inputs=items[0]["x"][:4], calibration=items)


def test_the_statistics_are_those_of_one_batch_of_everything(model: nn.Module, items: list[dict[str, Tensor]]) -> None:
    before = model.norm.running_var.clone()  # type: ignore[union-attr, operator]
    graft = again(model, items).graft()
    assert torch.equal(model.norm.running_var, before)  # type: ignore[union-attr, arg-type]
    together = torch.cat([item["x"] for item in items])
    for module in (model.norm, model.last):
        module.momentum = 1.0  # type: ignore[assignment]
    model.train()(together)
    for name in ("norm", "last"):
        for statistic in ("running_mean", "running_var"):
            expected, found = (getattr(made.get_submodule(name), statistic) for made in (model, graft))
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)  # training divides by the biased variance


def test_every_view_has_them(model: nn.Module, items: list[dict[str, Tensor]], tmp_path: Path) -> None:
    x = items[0]["x"]
    done = again(model, items, {"type": "factorize", "solver": "svd", "rank": 2, "targets": ["conv", "next"]})
    expected = done.program(x)["output"]
    assert not torch.allclose(expected, model(x), atol=1e-2)
    assert torch.allclose(done.graft()(x), expected, atol=1e-6)
    done.save(tmp_path / "saved")
    assert torch.allclose(lrc.load(tmp_path / "saved")(x=x)["output"], expected, atol=1e-5)


def test_what_a_norm_gives_is_standard_again(model: nn.Module, items: list[dict[str, Tensor]]) -> None:
    done = again(model, items, {"type": "factorize", "solver": "svd", "rank": 2, "targets": ["conv", "next"]})
    graft = done.graft()
    x = torch.cat([item["x"] for item in items])
    h = graft.last(graft.next(torch.relu(graft.norm(graft.conv(x)))))  # type: ignore[operator]
    assert torch.allclose(h.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
    assert torch.allclose(h.var((0, 2, 3)), torch.ones(6), atol=1e-2)


def test_sites_without_one_say_so_and_a_second_time_changes_nothing(model: nn.Module, items: list[dict[str, Tensor]]) -> None:
    once = again(model, items)
    assert {d.name: d.keep for d in once.plan.decisions} == {
        "conv": None, "next": None, "head": "no batch norm with statistics of its own follows",
    }  # fmt: skip
    twice = again(model, items, AGAIN)
    x = items[0]["x"]
    assert torch.allclose(once.module(x), twice.module(x), atol=1e-5)
    gone = again(model, items, {"type": "fold_norms"})
    assert all(d.keep for d in gone.plan.of_pass(1))
