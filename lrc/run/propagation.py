"""`propagate: compressed`: every group of sites is solved behind the groups that are already compressed."""

from collections.abc import Callable, Sequence
from typing import Any

from lrc.measure import Lockstep
from lrc.measure.taps import taps_of
from lrc.program import Program
from lrc.run.session import Session
from lrc.solvers import Moments


def in_groups(program: Program, fqns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return, for every site, the sites that must be compressed before it: those of the group before, in graph order.

    Sites that read the same value are one group and do not wait for each other.
    """
    groups: list[list[str]] = []
    last = None
    for fqn in sorted(fqns, key=program.position):
        read = taps_of(program, fqn)[0].reads.name
        if read == last:
            groups[-1].append(fqn)
        else:
            groups.append([fqn])
            last = read
    before: dict[str, tuple[str, ...]] = {}
    for earlier, group in zip([[], *groups], groups, strict=False):
        before |= dict.fromkeys(group, tuple(earlier))
    return before


def lockstep(program: Program, session: Session, options: Any, fqns: Sequence[str]) -> Callable[[str], Moments]:
    """Return a function from a site to its moments behind the compressed program, to be called in graph order."""
    dense = program.clone()
    gradients = session.moments(dense, fqns, options.solver.needs, options.solver)
    gradients(fqns[0]) if fqns else None
    walk = Lockstep(dense, program, session.batches)

    def of(fqn: str) -> Moments:
        return walk.advance_to(fqn, gradients(fqn))

    return of
