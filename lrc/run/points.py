"""What a budget that was tried would make of the model, as a point of the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lrc.errors import LrcError
from lrc.measure.workload import rows_per_sample, shapes_at
from lrc.program import Program
from lrc.ranks import SiteCurve
from lrc.run.budget import costs
from lrc.run.plan import Decision, Point
from lrc.run.session import Session
from lrc.run.summary import stays

Total = Callable[[Sequence[Decision]], float | None]


class Draw(Protocol):
    """What turns decisions into a point of the plan."""

    def __call__(self, decisions: Sequence[Decision], budget: str, amount: float, *, refused: str = "") -> Point:
        """Return the point; of a budget that was refused, with the reason and without sizes."""


def drawer(program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve], index: int) -> Draw:
    """Return what turns decisions on `program` into a point: sizes of the whole model, FLOPs, time and loss of the targets."""
    counted = with_rows(program, session, options, curves)
    timed = all(curve.times is not None for curve in curves.values()) and bool(curves)

    def flops(decisions: Sequence[Decision]) -> float | None:
        if counted is None or any(len(d.sites) > 1 for d in decisions):
            return None
        return sum(costs(counted[d.name], "flops", d)[1] for d in decisions if d.name in counted)

    def ms(decisions: Sequence[Decision]) -> float | None:
        return sum(costs(curves[d.name], "ms", d)[1] for d in decisions if d.name in curves) if timed else None

    return drawn(program, index, flops, ms)


def drawn(program: Program, index: int, flops: Total, ms: Total) -> Draw:
    """Return what turns decisions of a pass into a point. flops, ms: what decisions come to, None where that is not known."""
    numbers, size = program.size()

    def draw(decisions: Sequence[Decision], budget: str, amount: float, *, refused: str = "") -> Point:
        if refused:
            return Point(index, budget, amount, note=refused)
        more_numbers, more_bytes = difference(program, decisions)
        units = {d.unit for d in decisions if d.unit is not None}
        return Point(
            index,
            budget,
            amount,
            parameters=numbers + more_numbers,
            bytes=size + more_bytes,
            flops=flops(decisions),
            ms=ms(decisions),
            loss=sum(d.predicted or 0.0 for d in decisions) if len(units) < 2 else None,
            unit=next(iter(units)) if len(units) == 1 else None,
        )

    return draw


def with_rows(program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve]) -> dict[str, SiteCurve] | None:
    """Return the curves with the rows that every site sees, or None where the traced shapes do not tell."""
    try:
        shapes = shapes_at(program, session.samples(program), options.at)
        return {fqn: replace(curve, rows=rows_per_sample(program, program.sites[fqn], shapes)) for fqn, curve in curves.items()}
    except LrcError:
        return None


def difference(program: Program, decisions: Sequence[Decision]) -> tuple[int, int]:
    """Return by how many numbers and bytes the program grows when `decisions` are carried out.

    The old weight goes, unless something else reads it too.
    """
    numbers = size = 0
    for d in decisions:
        numbers += d.after.parameters - d.before.parameters
        size += d.after.bytes - d.before.bytes
        for site in (program.sites[fqn] for fqn in d.sites):
            if stays(site) and d.keep is None:
                cost = site.map.cost(1)
                numbers, size = numbers + cost.parameters, size + cost.bytes
    return numbers, size
