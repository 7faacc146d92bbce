"""Training where every layer's truncation stands, by gradient descent of the model's own loss through the graph.

The decompositions are fixed: of a site's terms, B diag(mask) A x is what the graph computes, and the mask's position alone
is trained. So no decomposition is differentiated, and nothing has to be stabilised.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lrc.data import Batch, Batches
from lrc.data.batches import IGNORED
from lrc.measure.cache import Cache
from lrc.measure.cotangents import has_classes, labels_of, without_padding
from lrc.program import Program
from lrc.program.readout import readout
from lrc.ranks.candidates import Budget, Candidates
from lrc.ranks.learned import Course, LearnedAllocation, along, fitted, mask, places, positions_of
from lrc.solvers import Decomposition

SAVED = 8  # steps after which what has been learned is stored
CHECKED = 4  # batches at most that are held back to compare the end with the start
BETAS = (0.9, 0.99)
DROPPED = 1e-6  # terms that the mask leaves less of are not computed


class Truncated:
    """A program whose sites stand as their terms behind a mask. Its tensors are those of `program`, and not trained."""

    def __init__(self, program: Program, terms: Mapping[str, Decomposition]) -> None:
        self.program = program.clone()
        self.terms = terms
        for fqn, found in terms.items():
            site = self.program.sites[fqn]
            self.program.replace(fqn, site.layout.product(*found.truncate(len(found.S), site.dtype)), settle=False)
        self.program.settle()
        self.fixed = {name: tensor.detach() for name, tensor in self.program.tensors().items()}

    def __call__(self, masks: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the outputs for a batch. masks: of every site, (terms,); differentiable in them."""
        changed = dict(self.fixed)
        for fqn, kept in masks.items():
            for module in self.program.placed(fqn):
                changed |= self._masked(fqn, module, kept)
        found: dict[str, Tensor] = functional_call(
            self.program.graph_module, changed, (), self.program.inputs.fill(batch), tie_weights=False
        )
        return found

    def _masked(self, fqn: str, module: str, kept: Tensor) -> dict[str, Tensor]:
        """Return the tensors of one use behind a mask; terms that it hides are left out where factors are two tensors."""
        made, mean = self.fixed, self.terms[fqn].mean
        B, A = made[f"{module}.B"], made.get(f"{module}.A")
        kept = kept.to(B.dtype)
        count = len(kept)
        if A is not None and B.ndim == 2:
            count = max(1, int((kept.detach() > DROPPED).sum()))
        changed = {f"{module}.B": B[:, :count] * kept[:count].reshape(1, -1, *[1] * (B.ndim - 2))}
        if A is not None:
            changed[f"{module}.A"] = A[:count]
        if mean is not None:  # the bias carries the mean of what is dropped
            dropped = (1 - kept) * (self.terms[fqn].A @ mean.to(self.terms[fqn].A)).to(B)
            changed[f"{module}.bias"] = made[f"{module}.bias"] + B.flatten(1) @ dropped
        return changed


@dataclass(frozen=True)
class Problem:
    """What is learned: the truncations of `sites` within `budget`, from the candidates `start`, on `batches`.

    terms: of every site, by name. key: the hash of all that the result depends on.
    """

    program: Program
    terms: Mapping[str, Decomposition]
    sites: Sequence[Candidates]
    budget: Budget
    start: Sequence[int]
    batches: Batches
    options: LearnedAllocation
    seed: int = 0
    key: str = ""


@dataclass(frozen=True)
class Learned:
    """The learned candidate of every site, and the loss on the batches that were held back at the start and at the end."""

    places: tuple[int, ...]
    before: float
    after: float


def learn(problem: Problem, cache: Cache | None = None, progress: Callable[[int, int], None] | None = None) -> Learned:
    """Return the learned truncation; that of the start where it turns out no better on the batches held back.

    Adam on the positions, each as a share of its layer's full rank; every step goes along the budget and is put back on it
    (`lrc.ranks.learned`). Of four batches or more, a quarter (four at most) is held back and not trained on; of fewer, all
    are trained on. The same for the same seed and thread count; with a cache a killed run goes on where it stopped.
    Source: Wang et al. (2025), Dobi-SVD, arXiv:2502.02723, section 3.1. Departures: the bases are those of the solver, fixed,
    so the gradient needs no SVD (the paper differentiates one of every activation, with a Taylor series for near-equal
    singular values); the budget is met at every step, not by a penalty of a set weight; the loss is the cross-entropy, not
    its exponential.
    """
    known = None if cache is None else cache.get(f"{problem.key}-truncation")
    if known is not None:
        before, after = known["losses"].tolist()
        return Learned(tuple(known["places"].tolist()), before, after)
    full = [len(problem.terms[site.name].S) for site in problem.sites]
    courses = [Course.of(site, count) for site, count in zip(problem.sites, full, strict=True)]
    run = Training(problem, courses, cache)
    for step in run.steps():
        if progress is not None:
            progress(step, problem.options.steps)
    if progress is not None:
        progress(problem.options.steps, problem.options.steps)
    found = places(problem.sites, courses, run.shares, problem.budget)
    before, after = (run.loss_of(chosen) for chosen in (problem.start, found))
    if not after < before:
        found, after = list(problem.start), before
    if cache is not None:
        losses = torch.tensor([before, after], dtype=torch.float64)
        cache.put(f"{problem.key}-truncation", {"places": torch.tensor(found), "losses": losses})
    return Learned(tuple(found), before, after)


class Training:
    """The state of a training: every site's share, and Adam's averages of gradients and of their squares."""

    def __init__(self, problem: Problem, courses: Sequence[Course], cache: Cache | None) -> None:
        self.problem, self.courses, self.cache = problem, courses, cache
        self.model = Truncated(problem.program, problem.terms)
        self.shares = fitted(courses, positions_of(problem.sites, courses, problem.start), problem.budget.amount)
        self.mean, self.square = np.zeros(len(courses)), np.zeros(len(courses))
        batches = list(problem.batches)
        held = min(CHECKED, len(batches) // 4)
        self.trained, self.held = batches[: len(batches) - held], batches[len(batches) - held :] or batches[:CHECKED]

    def steps(self) -> Iterator[int]:
        """Make every step that is not stored yet; yield its place before it is made."""
        options = self.problem.options
        for step in range(self._restore(), options.steps):
            yield step
            epoch, place = divmod(step, len(self.trained))
            generator = torch.Generator().manual_seed(self.problem.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.trained), generator=generator).tolist()
            self._step(self.trained[order[place]], step)
            if (step + 1) % SAVED == 0 or step + 1 == options.steps:
                self._store(step + 1)

    def _step(self, batch: Batch, step: int) -> None:
        options = self.problem.options
        positions = torch.from_numpy(self.shares * [course.bounds[1] for course in self.courses]).requires_grad_()
        loss = self._loss(positions, batch)
        (by_position,) = torch.autograd.grad(loss, positions)
        gradient = by_position.numpy() * [course.bounds[1] for course in self.courses]
        gradient = along(self.courses, self.shares, gradient)
        self.mean += (1 - BETAS[0]) * (gradient - self.mean)
        self.square += (1 - BETAS[1]) * (gradient**2 - self.square)
        mean, square = self.mean / (1 - BETAS[0] ** (step + 1)), self.square / (1 - BETAS[1] ** (step + 1))
        rate = options.learning_rate * (1 + math.cos(math.pi * step / options.steps)) / 2
        moved = self.shares - rate * mean / (np.sqrt(square) + 1e-30)
        self.shares = fitted(self.courses, moved, self.problem.budget.amount)

    def _loss(self, positions: Tensor, batch: Batch) -> Tensor:
        masks = {
            site.name: mask(position, int(course.bounds[1]), self.problem.options.smoothing * course.bounds[1])
            for site, course, position in zip(self.problem.sites, self.courses, positions, strict=True)
        }
        return self._distance(self.model(masks, batch), batch)

    def _distance(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean loss of outputs, as the options say of which."""
        task, kind = self.problem.program.task, self.problem.options.loss
        found = readout(outputs, batch, task)
        if kind == "labels" or (kind == "auto" and has_classes(task) and (task == "text-generation" or "labels" in batch)):
            labels = labels_of(found, batch, task)
            return F.cross_entropy(found.reshape(-1, found.shape[-1]).float(), labels, ignore_index=IGNORED)
        with torch.no_grad():
            wanted = readout(self.problem.program(**batch), batch, task)
        return from_model(found.float(), wanted.float(), row_weights(found, batch), classes=has_classes(task))

    def loss_of(self, chosen: Sequence[int]) -> float:
        """Return the mean loss on the batches that were held back, truncated at whole ranks."""
        shares = positions_of(self.problem.sites, self.courses, chosen)
        masks = {}
        for site, course, share in zip(self.problem.sites, self.courses, shares, strict=True):
            count = int(course.bounds[1])
            masks[site.name] = (torch.arange(1, count + 1) <= round(share * count)).float()
        with torch.no_grad():
            losses = [float(self._distance(self.model(masks, batch), batch)) for batch in self.held]
        return sum(losses) / len(losses)

    def _restore(self) -> int:
        """Take over what a killed run had learned; return how many steps those were."""
        found = self.cache.get(f"{self.problem.key}-positions") if self.cache is not None else None
        if found is None:
            return 0
        self.shares, self.mean, self.square = (found[name].numpy() for name in ("shares", "mean", "square"))
        return int(found["step"])

    def _store(self, step: int) -> None:
        if self.cache is not None:
            state = {"shares": self.shares, "mean": self.mean, "square": self.square}
            tensors = {name: torch.from_numpy(value) for name, value in state.items()}
            self.cache.put(f"{self.problem.key}-positions", {**tensors, "step": torch.tensor(step)})


def from_model(found: Tensor, wanted: Tensor, weights: Tensor, *, classes: bool) -> Tensor:
    """Return the mean distance of outputs from those of the model, (…, features) both, rows weighed by `weights` (…).

    classes: the Kullback-Leibler divergence of the softmax, in nats a row; else the squared error over the squared outputs.
    """
    if classes:
        rows = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return (rows * weights).sum() / weights.sum().clamp(min=1)
    squares = ((found - wanted).square() * weights[..., None]).sum()
    return squares / (wanted.square() * weights[..., None]).sum().clamp(min=torch.finfo(wanted.dtype).tiny)


def row_weights(output: Tensor, batch: Batch) -> Tensor:
    """Return 1 for every row of an output (…, features), 0 for those of padding."""
    weights = torch.ones(output.shape[:-1], device=output.device)
    return without_padding(weights[..., None], batch)[..., 0]
