"""The recipe lr2vq: pieces in a few dimensions, trained, clustered, stored as codes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.maps import Chain, Codebook, Segments
from lrc.train.distributed import World

DATA = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


class Net(nn.Module):
    """A convolution and two linears behind each other, of rows of 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up, self.down = nn.Conv2d(2, 24, 3, padding=1), nn.Linear(24 * 8, 48), nn.Linear(48, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        images = torch.relu(self.conv(x.reshape(-1, 2, 2, 4)))
        return self.down(torch.tanh(self.up(images.flatten(1))))


def compiled(
    recipe: dict[str, Any], *, solver: dict[str, Any] | None = None, cache: str = "cache", **train: Any
) -> lrc.Compiled:
    passes = [
        {"type": "factorize", "solver": {"type": "lr2vq", "m": 6, "k": None, **(solver or {})}, "rank": 3,
         "targets": ["up", "down"]},
        {"type": "factorize", "solver": {"type": "lr2vq", "m": 9, "k": None, **(solver or {})}, "rank": 4, "targets": ["conv"]},
        {"type": "train", "objective": "distillation", "optimizer": {"type": "adamw", "lr": 3e-3}, "steps": 30,
         "batch_size": 16, "recipe": {"type": "lr2vq", "k": 8, **recipe}, **train},
    ]  # fmt: skip
    calibration = [{"x": part} for part in DATA.split(16)]
    return lrc.compile(
        Net().eval(), {"version": 1, "passes": passes}, inputs={"x": DATA[:4]}, calibration=calibration, cache=cache
    )


@pytest.mark.parametrize("assign", ["dkm", "straight_through"])
def test_weights_are_trained_then_clustered_and_end_in_codes(assign: str) -> None:
    done = compiled({"assign": assign, "every": 4})
    losses = [row["loss"] for row in done.training[0]["history"]]
    assert losses[14] < losses[0]  # the low-rank network
    assert losses[15] > losses[14]  # clustered
    assert losses[29] < losses[15]
    for fqn in ("conv", "up", "down"):
        made = done.program.sites[fqn].map
        assert isinstance(made, Chain), made
        assert isinstance(made.B, Codebook)
        assert isinstance(made.A, Segments)
        assert made.B.codebook.dtype == made.A.basis.dtype == torch.float16
    assert any("3 weights in codes: " in note for note in done.plan.notes)
    stored = sum(t.nbytes for fqn in ("conv", "up", "down") for t in done.program.sites[fqn].map.state_dict().values())
    assert stored == sum(d.after.bytes for d in done.plan.decisions if d.index == 2)
    clustered = compiled({"assign": assign, "iterations": 50}, cache="other", steps=1)
    exact = Net().eval()(DATA)
    error, untrained = ((run.module(DATA) - exact).norm() for run in (done, clustered))
    assert error < untrained


@pytest.mark.parametrize("assign", ["dkm", "straight_through"])
def test_what_is_validated_is_clustered_and_is_what_is_stored(assign: str) -> None:
    np.savez("valid.npz", x=DATA.numpy())
    done = compiled(
        {"assign": assign, "dtype": "model", "every": 3}, validation={"data": "valid.npz", "every": 5}, batch_size=64
    )
    history = done.training[0]["history"]
    validations = {int(row["step"]): row["validation"] for row in history if "validation" in row}
    assert validations[15] < validations[20]  # not clustered yet
    best = done.training[0]["best_step"]
    assert best > 15
    made = done.program.sites["up"].map
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["bias", "B.codebook", "A.basis"]
    exact = Net().eval()(DATA)
    error = (done.module(DATA) - exact).square().sum() / exact.square().sum()
    assert float(error.detach()) == pytest.approx(validations[best], rel=1e-3)


@pytest.mark.parametrize("assign", ["dkm", "straight_through"])
def test_a_killed_run_ends_where_another_does(assign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled({"assign": assign, "every": 4}, checkpoint_every=1000, cache="whole")

    class KilledError(Exception):
        """The process dies."""

    from lrc.train.loop import Loop

    step = Loop.step

    def dying(self: Loop, done: int, per_epoch: int) -> dict[str, float]:
        if done == 21:
            raise KilledError
        return step(self, done, per_epoch)

    monkeypatch.setattr(Loop, "step", dying)
    with pytest.raises(KilledError):
        compiled({"assign": assign, "every": 4}, checkpoint_every=10, cache="killed")
    monkeypatch.setattr(Loop, "step", step)
    resumed = compiled({"assign": assign, "every": 4}, checkpoint_every=10, cache="killed")
    assert torch.equal(resumed.module(DATA), whole.module(DATA))
    again = compiled({"assign": assign, "every": 4}, checkpoint_every=10, cache="killed")
    assert torch.equal(again.module(DATA), whole.module(DATA))


def test_there_must_be_something_to_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="weights in pieces that are not clustered yet"):
        compiled({}, solver={"k": 4, "dtype": "model"})
    with pytest.raises(UsageError, match="per_layer"):
        compiled({"assign": "straight_through"}, per_layer=True, clip=None)
    monkeypatch.setattr(import_module("lrc.train.recipes.lr2vq"), "world", lambda: World(0, 2))
    with pytest.raises(UsageError, match="codewords, which are no part of the model, are not averaged"):
        compiled({"assign": "straight_through"})


def test_a_plain_run_trains_codewords_of_codes_that_stay() -> None:
    step = {"type": "factorize", "solver": {"type": "lr2vq", "m": 6, "k": 8, "dtype": "model"}, "rank": 3, "targets": ["up"]}
    train = {"type": "train", "objective": "distillation", "optimizer": {"type": "adamw", "lr": 1e-2}, "steps": 10,
             "batch_size": 16}  # fmt: skip
    calibration = [{"x": part} for part in DATA.split(16)]
    done = lrc.compile(
        Net().eval(), {"version": 1, "passes": [step, train]}, inputs={"x": DATA[:4]}, calibration=calibration, cache="cache"
    )
    losses = [row["loss"] for row in done.training[0]["history"]]
    assert losses[-1] < losses[0]
    before = lrc.compile(Net().eval(), {"version": 1, "passes": [step]}, inputs={"x": DATA[:4]}, cache="cache")
    old, new = (run.program.sites["up"].map.B for run in (before, done))
    assert torch.equal(old.codes, new.codes)
    assert not torch.equal(old.codebook, new.codebook)
