"""How much every unit of a group matters: the scores of its entries, summed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrc.errors import DataError
from lrc.measure import digest
from lrc.measure.gradients import in_memory, mean_gradients, settled_loss
from lrc.program import Program
from lrc.program.dependency import Group
from lrc.run import Session
from lrc.solvers import Moments
from lrc.solvers.scores import SCORES, Score

MEMORY = 2**30  # bytes of gradients that are held at once
Summed = Mapping[tuple[str, str], Tensor]


def unit_scores(program: Program, session: Session, groups: Sequence[Group], criterion: str) -> dict[str, Tensor]:
    """Return the scores of the units of every group, (units,) float64, not negative. What was measured is cached."""
    score = SCORES[criterion]
    measured = score.gradient or score.needs
    key = digest(
        "units-1", program.digest(), criterion, [group.name for group in groups], list(session.batches) if measured else [],
        session.seed if measured else 0, torch.__version__, torch.get_num_threads(),
    )  # fmt: skip
    stored = session.cache.get(key)
    if stored is None or any(group.name not in stored for group in groups):
        fqns = [fqn for fqn in program.sites if any(fqn in group.sites for group in groups)]
        summed = _summed(program, session, fqns, score)
        stored = {group.name: of_units(group, summed, score) for group in groups}
        session.cache.put(key, stored)
    return dict(stored)


def of_units(group: Group, summed: Summed, score: Score) -> Tensor:
    """Return the scores of a group's units from the sums over rows and columns of every site."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.site is not None and member.slot[2] in score.sides:
            total += summed[member.site, member.slot[2]][torch.from_numpy(member.index)].sum(1)
    return total.sqrt() if score.root else total


def sums_of(entries: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Return the sums of scores (out_features, in_features) over each row and over each of `inputs` channels, float64."""
    by_channel = entries.double().reshape(len(entries), inputs, -1)
    return by_channel.sum((1, 2)).cpu(), by_channel.sum((0, 2)).cpu()


def channels_of(program: Program, fqn: str) -> int:
    """Return how many indices the inputs of a weight have: features, or channels of one group."""
    site = program.sites[fqn]
    kernel = getattr(site.layout, "kernel", ())
    return site.in_features // int(torch.Size(kernel).numel())


def _summed(program: Program, session: Session, fqns: Sequence[str], score: Score) -> Summed:
    moments = session.moments(program, fqns, score.needs)
    found: dict[tuple[str, str], Tensor] = {}
    for part in in_memory(program, fqns, MEMORY) if score.gradient else [list(fqns)]:
        gradients = _gradients(program, session, part) if score.gradient else {}
        for fqn in part:
            weight = program.sites[fqn].map.dense().weight
            weight = weight.flatten(1) if weight.ndim > 2 else weight
            entries = score.entries(weight, moments(fqn) if score.needs else Moments(), gradients.get(fqn))
            found[fqn, "out"], found[fqn, "in"] = sums_of(entries, channels_of(program, fqn))
    return found


def _gradients(program: Program, session: Session, fqns: Sequence[str]) -> dict[str, Tensor]:
    batches = list(session.batches)
    if not batches:
        raise DataError("calibration", message="the criterion `taylor` needs data")
    loss = settled_loss("auto", program.task, batches[0])
    return mean_gradients(program, session.track("gradients", batches), fqns, loss=loss, seed=session.seed)
