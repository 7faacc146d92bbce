"""How much every unit of a group matters: the scores of its entries, summed, or what the loss changes by without it."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lrc.errors import DataError
from lrc.measure import digest
from lrc.measure.gates import by_gates, gate_gradients, readers
from lrc.measure.gradients import settled_loss
from lrc.program import Program
from lrc.program.batch_norms import norm_node
from lrc.program.dependency import Group
from lrc.run import Session
from lrc.solvers import Moments
from lrc.solvers.checks import check_finite
from lrc.solvers.scores import SCORES, Score

Summed = Mapping[tuple[str, str], Tensor]


def unit_scores(program: Program, session: Session, groups: Sequence[Group], criterion: str) -> dict[str, Tensor]:
    """Return the scores of the units of every group, (units,) float64, not negative. What was measured is cached.

    Raises SolverError where they are not finite, which no order is in.
    """
    score = SCORES[criterion]
    measured = score.entries is None or score.needs
    key = digest(
        "units-4", program.digest(), criterion, [group.name for group in groups], list(session.batches) if measured else [],
        session.seed if measured else 0, torch.__version__, torch.get_num_threads(),
    )  # fmt: skip
    stored = session.cache.get(key)
    if stored is None or any(group.name not in stored for group in groups):
        if score.entries is None:
            stored = by_gates(groups, _gradients(program, session, groups, criterion))
        else:
            fqns = [fqn for fqn in program.sites if any(fqn in group.sites for group in groups)]
            summed = _summed(program, session, fqns, score)
            normed = {fqn for fqn in fqns if norm_node(program, program.sites[fqn]) is not None}
            stored = {group.name: of_units(group, summed, score, normed) for group in groups}
        session.cache.put(key, stored)
    for group in groups:
        check_finite(f"the scores of {group.name} by {criterion}", stored[group.name])
    return dict(stored)


def of_units(group: Group, summed: Summed, score: Score, normed: Collection[str] = ()) -> Tensor:
    """Return the scores of a group's units from the sums over rows and columns of every site.

    normed: sites that a batch norm follows. What it makes of a row is the same whatever the length of the row, so that rows of
    these do not count where anything else of the group does.
    """
    counted = [m for m in group.members if m.site is not None and m.slot[2] in score.sides]
    scaled = [m for m in counted if m.slot[2] == "in" or m.slot[1] not in normed] or counted
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in scaled:
        total += summed[member.slot[1], member.slot[2]][torch.from_numpy(member.index)].sum(1)
    return total


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
    assert score.entries is not None, "it scores entries"
    moments = session.moments(program, fqns, score.needs)
    found: dict[tuple[str, str], Tensor] = {}
    for fqn in fqns:
        weight = program.sites[fqn].map.dense().weight
        weight = weight.flatten(1) if weight.ndim > 2 else weight
        entries = score.entries(weight, moments(fqn) if score.needs else Moments())
        found[fqn, "out"], found[fqn, "in"] = sums_of(entries, channels_of(program, fqn))
    return found


def _gradients(program: Program, session: Session, groups: Sequence[Group], criterion: str) -> Iterator[Mapping[str, Tensor]]:
    """Yield the gradients of gates of every batch, those of a convolution in groups summed over the groups."""
    batches = list(session.batches)
    if not batches:
        raise DataError("calibration", message=f"the criterion `{criterion}` needs data")
    sites = sorted({fqn for group in groups for fqn, _ in readers(group)})
    loss = settled_loss("auto", program.task, batches[0])
    for found in gate_gradients(program, session.track("gates", batches), sites, loss=loss, seed=session.seed):
        yield {fqn: v.reshape(len(v), -1, channels_of(program, fqn)).sum(1) for fqn, v in found.items()}
