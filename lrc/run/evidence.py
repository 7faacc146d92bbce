"""What an allocator wants to know of the model before it shares a budget: measured once, kept in the cache."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.errors import UsageError
from lrc.measure import digest
from lrc.measure.cotangents import has_classes
from lrc.measure.influence import block_influence, block_name
from lrc.program import Program
from lrc.program.readout import readout
from lrc.ranks import Choice, Evidence, SiteCurve
from lrc.run.quality import Choices, trials_of
from lrc.run.session import Session
from lrc.run.statistics import Terms

Make = Callable[[Choices], Program]
HELD = 2**26  # numbers of the dense model's outputs that are held; beyond it they are computed again


def check_evidence(program: Program, session: Session, options: Any, index: int) -> None:
    """Raise UsageError where the allocator of a budget asks for what cannot be measured, before anything is."""
    if not options.rank.budget or not options.allocate.measures:
        return
    metric = getattr(options.allocate, "metric", None)
    if metric is not None:
        trials_of(program, session, metric, f"{session.where(index)}.allocate").check()
    elif not session.has_data:
        raise UsageError(
            f"{session.where(index)}.allocate",
            message=f"`{options.allocate.type}` looks at the model's runs, and the spec has no `calibration`",
            hint="Add `calibration: {dataset: FILE}`, or choose another allocator",
        )


def with_evidence(
    program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve], terms: Terms, make: Make, index: int
) -> dict[str, SiteCurve]:
    """Return the curves with what the allocator of a budget asks for; others are as they were."""
    if options.rank.budget and options.allocate.measures == "influence":
        return with_influence(program, session, curves, index)
    if options.rank.budget and options.allocate.measures == "sensitivity":
        return with_sensitivity(program, session, options, curves, terms, make, index)
    return dict(curves)


def with_influence(program: Program, session: Session, curves: Mapping[str, SiteCurve], index: int) -> dict[str, SiteCurve]:
    """Return the curves with the influence of the block that each site is in.

    Raises UsageError where no block of the targets is found. Blocks that change the shape of what passes through them are
    noted, and count as one of mean influence.
    """
    names = {fqn: block_name(fqn) for fqn in curves}
    found = block_influence(program, list(session.batches), sorted(set(names.values()) - {""}), session.cache)
    if not found and curves:
        raise UsageError(
            f"{session.where(index)}.allocate",
            message="no target is in a repeated block (`layers.3`, `layer2.0`) whose input and output are of one shape",
            hint="Choose another allocator",
        )
    unknown = sorted({name for name in names.values() if name and name not in found})
    if unknown:
        session.notices.append(f"block influence: {', '.join(unknown)} change the shape, and count as blocks of mean influence")
    return {fqn: replace(curve, evidence=Evidence(names[fqn], found.get(names[fqn]))) for fqn, curve in curves.items()}


def with_sensitivity(
    program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve], terms: Terms, make: Make, index: int
) -> dict[str, SiteCurve]:
    """Return the curves with how much worse the model is with each site alone at each ratio.

    Costs one run over the data for every site and ratio; every value is stored when it is there.
    """
    work = []
    for fqn, curve in curves.items():
        site = curve.candidates(options.rank.unit, options.round_to)
        for ratio in options.allocate.ratios if site.ranks else ():
            place = site.within(ratio)
            share = (float(site.costs[place]) + site.fixed) / (float(site.costs[-1]) + site.fixed)
            if place < len(site.ranks):
                work.append((fqn, share, Choice(site.ranks[place], form=site.forms[place])))
    measure = measure_of(program, session, options, index)
    found: dict[str, dict[float, float]] = {fqn: {} for fqn in curves}
    for fqn, share, choice in session.track("sensitivity", work):
        found[fqn][share] = measure(f"{terms.key(fqn)} {choice.rank} {choice.form}", lambda: make({fqn: choice}))  # noqa: B023
    return {
        fqn: replace(curve, evidence=Evidence(block_name(fqn), None, tuple(sorted(found[fqn].items()))))
        for fqn, curve in curves.items()
    }


def measure_of(program: Program, session: Session, options: Any, index: int) -> Callable[[str, Callable[[], Program]], float]:
    """Return what says how much worse a changed program is: by the metric that is asked for, or by its outputs."""
    if options.allocate.metric is not None:
        trials = trials_of(program, session, options.allocate.metric, f"{session.where(index)}.allocate")
        sign = -1 if trials.options.higher_is_better else 1
        before = 0.0 if trials.options.relative else trials.score(program).value
        return lambda _, make: sign * (trials.score(make()).value - before)
    outputs = Outputs(program, list(session.batches))
    key = digest("sensitivity-1", program.digest(), outputs.batches, session.seed, torch.__version__, torch.get_num_threads())

    def change(name: str, make: Callable[[], Program]) -> float:
        entry = f"{digest(key, name)}-sensitivity"
        stored = session.cache.get(entry)
        if stored is None:
            stored = {"value": torch.tensor([outputs.change(make())], dtype=torch.float64)}
            session.cache.put(entry, stored)
        return float(stored["value"])

    return change


class Outputs:
    """The dense model's outputs of interest on batches, and how far those of another program are from them."""

    def __init__(self, program: Program, batches: list[Mapping[str, Tensor]]) -> None:
        self.program = program
        self.batches = batches
        self._held: dict[int, Tensor] = {}

    def change(self, other: Program) -> float:
        """Return the mean divergence of logits, in nats, or the squared error of others relative to the outputs' squares."""
        total = scale = 0.0
        for i, batch in enumerate(self.batches):
            wanted, found = self._dense(i), self._run(other, batch)
            mask = _rows(found, batch)
            if has_classes(self.program.task):
                a, b = (F.log_softmax(value.double(), -1).reshape(-1, value.shape[-1]) for value in (wanted, found))
                rows = (a.exp() * (a - b)).sum(-1)
                total, scale = total + float(rows[mask].sum()), scale + float(mask.sum())
            else:
                a, b = (value.double().reshape(len(mask), -1) for value in (wanted, found))
                total, scale = total + float((a - b)[mask].square().sum()), scale + float(a[mask].square().sum())
        return total / scale if scale else 0.0

    def _dense(self, i: int) -> Tensor:
        if i in self._held:
            return self._held[i]
        made = self._run(self.program, self.batches[i])
        if made.numel() + sum(value.numel() for value in self._held.values()) <= HELD:
            self._held[i] = made
        return made

    def _run(self, program: Program, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            return readout(program(**inputs), batch, self.program.task).detach()


def _rows(value: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return which rows of the output are no padding, flat: tokens where it has them, else samples."""
    mask = batch.get("attention_mask")
    if mask is not None and value.ndim == 3 and value.shape[:2] == mask.shape:
        return mask.reshape(-1).bool()
    rows = value.shape[:-1].numel() if value.ndim > 1 else len(value)
    return torch.ones(rows, dtype=torch.bool)
