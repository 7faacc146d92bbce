"""The training loop: batches, losses, steps, validation, checkpoints. Random numbers follow from seed and step alone."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrc.data import Batch
from lrc.errors import DataError, TrainError
from lrc.train.checkpoint import Checkpoints
from lrc.train.data import Examples
from lrc.train.distributed import Alone
from lrc.train.memory import Watch
from lrc.train.recipes.base import Recipe
from lrc.train.settings import Settings, Validation

GROWTH = 1000.0  # times the first loss (or 1, if that is more): the run has diverged
RANKS = 2**40  # between the seeds of two processes
Row = dict[str, float]


class Losses(Protocol):
    """What turns a batch into a loss."""

    def __call__(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean loss of a batch, with its graph."""


@dataclass
class Loop:
    """One training run over `parameters`, which it changes in place.

    module: is put into training mode for a step and into eval mode else; buffers: what else a step changes (running
    statistics). in_backward: the optimizer steps while gradients are computed (`PerLayer`). report: told the steps done.
    parallel: how several processes share the work (`distributed`); then losses and parameters are what it has made of them.
    grown: bytes that a step allocated at most, measured once, at the largest batch of an epoch.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    examples: Examples
    losses: Losses
    optimizer: Optimizer
    settings: Settings
    checkpoints: Checkpoints
    validation: Validation | None = None
    in_backward: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    parallel: Alone | None = None
    report: Callable[[int, int], None] = lambda done, total: None
    history: list[Row] = field(default_factory=list)
    best: dict[str, Any] | None = None
    rate: float = 0.0
    rates: list[float] = field(default_factory=list)
    epochs: dict[int, list[list[int]]] = field(default_factory=dict)
    grown: int | None = None

    def run(self) -> list[Row]:
        """Train to the last step of the part, or until validation stops gaining; return what happened at every step.

        A checkpoint of the same part is taken over. With a validation, the best parameters of the final part are left in place,
        else the last ones.
        Raises TrainError for a loss or gradient that is not finite and for a run that diverges, DataError for too little data.
        """
        self.parallel = self.parallel or Alone(self.losses, self.parameters)
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.rates = [group["lr"] * group.get("lr_factor", 1.0) for group in self.optimizer.param_groups]
        per_epoch = len(self.batches_of(0))
        if per_epoch == 0:
            raise DataError(
                "train.data", expected=f"at least one batch, {self.settings.batch_size} samples (without a mask of one length)",
                got=str(len(self.examples)), hint="Lower `batch_size`, or give more data",
            )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            part = self.settings.running
            done, end = self.restore(), part.end
            self.report(done, self.settings.steps)
            watched = self.heaviest(done, per_epoch) if self.shared.world.size == 1 else None
            while done < end and not self.stopped():
                with self.watching() if done == watched else nullcontext():
                    self.history.append(self.step(done, per_epoch))
                done += 1
                if self.validation and (done % self.validation.every == 0 or done == end):
                    self.validate(done)
                if done % self.settings.checkpoint_every == 0 or done == end or self.stopped():
                    state = self.shared.whole(self.state(done))
                    self.sound(done, state["parameters"])
                    if self.shared.world.first:
                        self.checkpoints.save(done, state)
                self.report(done, self.settings.steps)
        if self.best is not None:
            self.load(self.best["parameters"], self.best["buffers"])
        self.shared.finish()
        self.module.eval()
        return self.history

    @property
    def shared(self) -> Alone:
        """How the work is shared, from the start of the run on."""
        assert self.parallel is not None, "set when the run starts"
        return self.parallel

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what is allocated meanwhile."""
        with Watch() as watch:
            yield
        self.grown = watch.peak

    def heaviest(self, done: int, per_epoch: int) -> int:
        """Return the step of the next epoch, but the next one (states are made there), that has the largest batch."""
        each = self.settings.accumulate

        def size(step: int) -> int:
            batches = [self.batches_of(i // per_epoch)[i % per_epoch] for i in range(step * each, (step + 1) * each)]
            return max(self.examples.numbers(places) for places in batches)

        ahead = range(done + 1, min(self.settings.running.end, done + 1 + max(1, per_epoch // each)))
        return max(ahead, key=size, default=self.settings.running.end - 1)

    def batches_of(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch; only the last ones asked for are remembered."""
        if epoch not in self.epochs:
            self.epochs = {epoch: self.examples.epoch(self.settings.batch_size, self.settings.seed, epoch)}
        return self.epochs[epoch]

    def step(self, done: int, per_epoch: int) -> Row:
        """Take one step; return its figures."""
        settings = self.settings
        factor = settings.schedule.factor(done, settings.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.module.train()
        self.recipe.before(done)
        total = 0.0
        for micro in range(done * settings.accumulate, (done + 1) * settings.accumulate):
            epoch, place = divmod(micro, per_epoch)
            batches = self.batches_of(epoch)
            batch = self.examples.batch(self.shared.share(batches[place % len(batches)]))
            seed = settings.seed * 1_000_003 + micro + RANKS * self.shared.world.rank
            torch.manual_seed(seed)
            with self.shared.accumulating() if micro + 1 < (done + 1) * settings.accumulate else nullcontext():
                with autocast(self.parameters, settings.bfloat16):
                    loss = self.shared.losses(batch, torch.Generator().manual_seed(seed)) / settings.accumulate
                penalty = self.recipe.penalty() if micro == done * settings.accumulate else None
                total += self.shared.world.mean(float(loss.detach()))
                if not math.isfinite(total):
                    raise self.failure(done, f"the loss is {total}")
                self.backward(loss if penalty is None else loss + penalty, done)
        first = self.history[0]["loss"] if self.history else total
        if total > GROWTH * max(first, 1.0):
            raise self.failure(done, f"the loss has grown from {first:.4g} to {total:.4g}")
        row = {"step": float(done + 1), "loss": total, "lr": self.rate * factor}
        if not self.in_backward:
            row["grad_norm"] = self.clipped(done)
            self.recipe.graded(done)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.recipe.after(done)
        return row

    def clipped(self, done: int) -> float:
        """Return the norm of the gradient, after shortening the gradient to the largest norm allowed."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not grads:
            raise self.failure(done, "no trained parameter has a gradient: the loss does not depend on any of them")
        norm = float(self.shared.whole(nn.utils.get_total_norm(grads)))
        if not math.isfinite(norm):
            raise self.failure(done, f"the gradient is not finite, first at {self.not_finite()}")
        if self.settings.clip is not None and norm > self.settings.clip:
            for grad in grads:
                grad.mul_(self.settings.clip / (norm + 1e-6))
        return norm

    def backward(self, loss: Tensor, done: int) -> None:
        """Compute the gradients; an optimizer that steps meanwhile takes none that is not finite."""
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
        except FloatingPointError as error:
            raise self.failure(done, f"the gradient is not finite, first at {self.not_finite()}") from error

    def not_finite(self) -> str:
        """Return the name of a parameter whose gradient is not finite; gradients are dropped."""
        grads = [(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
        found = next((name for name, grad in grads if not bool(grad.isfinite().all())), "none of them alone")
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def sound(self, done: int, parameters: Mapping[str, Tensor]) -> None:
        """Raise TrainError for values that are not finite, so that no checkpoint has them and no run ends with them."""
        for name, value in parameters.items():
            if not bool(value.isfinite().all()):
                raise self.failure(done - 1, f"the step has left values in {name} that are not finite")

    def failure(self, done: int, what: str) -> TrainError:
        """Return the error of a run that cannot go on: what happened, and where the last good state is."""
        last = self.checkpoints.last()
        kept = f"The last good checkpoint is {last.name} in {last.parent}" if last else "No checkpoint had been written yet"
        return TrainError(f"train, step {done + 1}", message=what, hint=f"{kept}. Lower the learning rate, or set `clip`")

    def validate(self, done: int) -> None:
        """Measure, and remember the parameters where they are the best so far."""
        assert self.validation is not None, "only called with a validation"
        self.module.eval()
        with torch.no_grad(), self.shared.gathered():
            value = self.shared.world.agreed(float(self.validation.measure()))
        self.history[-1]["validation"] = value
        if not math.isfinite(value):
            raise self.failure(done, f"the validation figure is {value}")
        if not (self.settings.running.final and self.recipe.comparable()):
            return
        sign = 1 if self.validation.greater else -1
        if self.best is None or sign * value > sign * self.best["value"]:
            self.best = {"value": value, "step": done, **copy.deepcopy(self.tensors())}

    def stopped(self) -> bool:
        """Say whether validation has not gained for as long as the patience lasts."""
        if self.validation is None or self.validation.patience is None or self.best is None:
            return False
        measured = [row["step"] for row in self.history if "validation" in row]
        best: float = self.best["step"]
        return sum(step > best for step in measured) >= self.validation.patience

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that training changes in the model."""
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": {name: b.detach() for name, b in self.buffers.items()},
        }

    def state(self, done: int) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, as plain data and tensors."""
        return {
            "step": done, "optimizer": self.optimizer.state_dict(), "history": self.history, "best": self.best,
            "recipe": self.recipe.state(),
            **self.tensors(),
        }  # fmt: skip

    def restore(self) -> int:
        """Take over the newest checkpoint; return the steps that are done."""
        found = self.checkpoints.newest() if self.shared.world.first else None
        found = self.shared.world.agreed(found)
        if found is None:
            return self.settings.running.first
        self.load(found["parameters"], found["buffers"])
        self.shared.load_optimizer(self.optimizer, found["optimizer"])
        self.recipe.load(found["recipe"])
        self.history, self.best = list(found["history"]), found["best"]
        return int(found["step"])

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copy values into the model."""
        for held, given in ((self.parameters, parameters), (self.buffers, buffers)):
            for name, value in given.items():
                held[name].copy_(self.shared.shared(value, held[name]))


def autocast(parameters: Mapping[str, Tensor], bfloat16: bool) -> AbstractContextManager[Any]:
    """Return the context of mixed precision on the device of the parameters."""
    if not bfloat16:
        return nullcontext()
    device = next(iter(parameters.values())).device.type
    return torch.autocast(device, dtype=torch.bfloat16)
