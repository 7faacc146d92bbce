"""The loop on its own: schedules, batches, checkpoints, resuming, and what it refuses."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.errors import DataError, TrainError
from lrc.train.checkpoint import Checkpoints
from lrc.train.data import Examples
from lrc.train.loop import Loop
from lrc.train.optim import Fira, PerLayer
from lrc.train.recipes import Recipe
from lrc.train.schedule import Schedule
from lrc.train.settings import Settings, Validation


def examples(count: int = 24, *, masked: bool = True) -> Examples:
    generator = torch.Generator().manual_seed(0)
    return Examples(tuple({"x": torch.randn(5, generator=generator)} for _ in range(count)), {}, masked)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def loop(
    folder: Path, loss: Callable[[nn.Module, Tensor], Tensor] | None = None, data: Examples | None = None, **settings: Any
) -> Loop:
    """Return a run that fits the sum of the inputs."""
    module = network()
    made = loss or (lambda module, x: ((module(x) - x.sum(1, keepdim=True)) ** 2).mean())
    given = {"steps": 12, "batch_size": 4, "checkpoint_every": 4, **settings}
    return Loop(
        module, dict(module.named_parameters()), {}, data or examples(), lambda batch, generator: made(module, batch["x"]),
        Fira(module.parameters(), lr=0.02, rank=2, update_proj_gap=3), Settings(**given), Checkpoints(folder),
    )  # fmt: skip


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    made = loop(tmp_path, steps=120)
    with torch.no_grad():
        before = float(made.losses(made.examples.batch(range(24)), torch.Generator()))
    made.run()
    with torch.no_grad():
        assert float(made.losses(made.examples.batch(range(24)), torch.Generator())) < 0.5 * before


def values(made: Loop) -> list[Tensor]:
    return [p.detach().clone() for p in made.parameters.values()]


def test_a_run_that_was_interrupted_ends_at_the_same_bytes(tmp_path: Path) -> None:
    whole = loop(tmp_path / "a")
    history = whole.run()
    assert history[0] != history[-1]
    for stop in (5, 8, 11):
        folder = tmp_path / f"b{stop}"
        broken = loop(folder)
        broken.report = lambda done, total, stop=stop: (_ for _ in ()).throw(KeyboardInterrupt) if done == stop else None
        with pytest.raises(KeyboardInterrupt):
            broken.run()
        resumed = loop(folder)
        assert resumed.run() == history
        assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))


def test_a_damaged_checkpoint_is_left_out(tmp_path: Path) -> None:
    whole = loop(tmp_path)
    whole.run()
    first, last = sorted(tmp_path.glob("*.pt"))
    assert (first.name, last.name) == ("step-00000008.pt", "step-00000012.pt")
    last.write_bytes(last.read_bytes()[:500])
    again = loop(tmp_path)
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(again), strict=True))


@pytest.mark.parametrize("damage", [b"", bytes(500), b"hello", b"abcd" + bytes(100), bytes(range(256)) * 4])
def test_a_checkpoint_of_any_other_bytes_is_left_out(damage: bytes, tmp_path: Path) -> None:
    made = Checkpoints(tmp_path)
    made.save(1, {"step": 1, "x": torch.ones(3)})
    made.save(2, {"step": 2, "x": torch.ones(3)}).write_bytes(damage)
    found = made.newest()
    assert found is not None
    assert found["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


class Spoiled(Recipe):
    """Leaves a value that is not finite after some step."""

    def __init__(self, parameter: Tensor, at: int) -> None:
        self.parameter, self.at = parameter, at

    @torch.no_grad()
    def after(self, done: int) -> None:
        if done + 1 == self.at:
            self.parameter[0, 0] = math.inf


@pytest.mark.parametrize("at", [8, 12])
def test_values_that_are_not_finite_are_in_no_checkpoint_and_end_no_run(at: int, tmp_path: Path) -> None:
    """The step's own loss was still finite; a checkpoint of what it left would be the one that a new run goes on from."""
    made = loop(tmp_path)
    made.recipe = Spoiled(made.parameters["3.weight"], at)
    words = rf"step {at}: the step has left values in 3\.weight that are not finite\. The last good .* is step-{at - 4:08d}\.pt"
    with pytest.raises(TrainError, match=words):
        made.run()
    whole, again = loop(tmp_path / "whole"), loop(tmp_path)
    assert again.run() == whole.run()


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.02)


def fira(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return Fira(groups, lr=0.02, rank=2)


@pytest.mark.parametrize("make", [adamw, fira])
def test_updates_inside_the_backward_pass_take_no_gradient_that_is_not_finite(make: Any, tmp_path: Path) -> None:
    calls = iter(range(100))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        weight = module[0].weight  # type: ignore[index]
        extra = torch.sqrt(weight * 0).sum() if next(calls) == 5 else 0.0  # the root of zero: 0, with an infinite slope
        return (module(x) ** 2).mean() + extra  # type: ignore[no-any-return]

    made = loop(tmp_path, loss)
    made.optimizer = PerLayer([{"params": list(made.module.parameters())}], make)
    made.in_backward = True
    words = r"step 6: the gradient is not finite, first at 0\.weight\. The last good checkpoint is step-00000004\.pt"
    with pytest.raises(TrainError, match=words):
        made.run()
    assert all(bool(p.isfinite().all()) and p.grad is None for p in made.parameters.values())


def test_the_users_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    made = loop(tmp_path)
    torch.manual_seed(5)
    made.run()
    assert torch.equal(torch.rand(3), wanted)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    runs = []
    for name, options in (("a", {"batch_size": 8}), ("b", {"batch_size": 4, "accumulate": 2})):
        made = loop(tmp_path / name, steps=1, **options)
        made.module[2].p = 0.0  # type: ignore[index,union-attr]
        made.examples.epoch(8, 0, 0)
        made.epochs = {0: [list(range(8))] if name == "a" else [list(range(4)), list(range(4, 8))]}
        made.run()
        runs.append(values(made))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*runs, strict=True))


def test_validation_keeps_the_best_and_stops_when_nothing_is_gained(tmp_path: Path) -> None:
    figures = iter([3.0, 1.0, 2.0, 2.0, 0.0, 0.0])
    made = loop(tmp_path)
    seen: list[list[Tensor]] = []

    def measure() -> float:
        seen.append(values(made))
        return next(figures)

    made.validation = Validation(measure, every=2, patience=2)
    history = made.run()
    assert len(history) == 8
    assert made.best is not None
    assert (made.best["step"], made.best["value"]) == (4, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(values(made), seen[1], strict=True))
    again = loop(tmp_path)
    again.validation = Validation(lambda: pytest.fail("a finished run measures nothing"), every=2, patience=2)
    assert len(again.run()) == 8
    assert all(torch.equal(a, b) for a, b in zip(values(again), seen[1], strict=True))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    calls = iter(range(100))
    made = loop(tmp_path, lambda module, x: module(x).sum() * (math.nan if next(calls) == 6 else 1.0))
    with pytest.raises(TrainError, match=r"step 7: the loss is nan\. The last good checkpoint is step-00000004\.pt"):
        made.run()
    assert (tmp_path / "step-00000004.pt").is_file()


def test_a_gradient_that_is_not_finite_is_told_with_the_parameter(tmp_path: Path) -> None:
    made = loop(
        tmp_path, lambda module, x: module(x).sum() + torch.sqrt(module[3].bias.detach() * 0 + module[3].bias * 0).sum()
    )  # type: ignore[index,operator,union-attr]
    before = values(made)
    with pytest.raises(TrainError, match=r"step 1: the gradient is not finite, first at 3\.bias\. No checkpoint"):
        made.run()
    assert all(torch.equal(a, b) for a, b in zip(before, values(made), strict=True))


def test_a_run_that_diverges_is_stopped(tmp_path: Path) -> None:
    calls = iter(range(100))
    made = loop(tmp_path, lambda module, x: (module(x) ** 2).mean() * 10.0 ** next(calls))
    with pytest.raises(TrainError, match="the loss has grown from"):
        made.run()


def test_a_loss_without_a_trained_parameter_is_refused(tmp_path: Path) -> None:
    made = loop(tmp_path, lambda module, x: torch.zeros((), requires_grad=True) * 1.0)
    with pytest.raises(TrainError, match="the loss does not depend on any of them"):
        made.run()


def test_data_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least one batch, 4 samples.*got 3"):
        loop(tmp_path, data=examples(3)).run()


def test_every_epoch_shows_every_example_once_in_another_order() -> None:
    data = examples(24)
    epochs = [data.epoch(4, 0, epoch) for epoch in range(2)]
    assert all(sorted(i for batch in epoch for i in batch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] == data.epoch(4, 0, 0)
    assert epochs[0] != data.epoch(4, 1, 0)


def test_without_a_mask_batches_have_one_length_and_with_one_they_are_padded() -> None:
    items = tuple({"input_ids": torch.arange(1, 2 + i % 3), "attention_mask": torch.ones(1 + i % 3)} for i in range(12))
    alone = Examples(items, {"input_ids": 9}, masked=False)
    for places in alone.epoch(2, 0, 0):
        assert len({len(items[i]["input_ids"]) for i in places}) == 1
    batch = Examples(items, {"input_ids": 9}, masked=True).batch([0, 2])
    assert batch["input_ids"].tolist() == [[1, 9, 9], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_schedule_rises_to_one_and_falls_to_its_end(kind: Any) -> None:
    made = Schedule(type=kind, warmup_ratio=0.1, final=0.25)
    factors = [made.factor(i, 100) for i in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(1.0 if kind == "constant" else 0.25)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    with pytest.raises(ValueError, match="not both"):
        Schedule(warmup_ratio=0.1, warmup_steps=3)
