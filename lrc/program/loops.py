"""Recurrent operators of a program, written out as loops for the passes, and put back where no weight was rewritten."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lrc.program.recurrences import close_recurrent, open_recurrent

if TYPE_CHECKING:
    from lrc.program.program import Program


def write_out(program: "Program", fqns: Iterable[str] | None = None) -> None:
    """Write the recurrent operators that sites are in out as loops, or all of them; doing so twice is once."""
    weights = None if fqns is None else {program.site(fqn).weight_name for fqn in fqns}
    for name, one in program.recurrent.items():
        if not one.created and (weights is None or not weights.isdisjoint(one.weights())):
            program.recurrent[name] = open_recurrent(program.graph_module.graph, one, program.originals)
            _edited(program)


def put_back(program: "Program") -> None:
    """Put the recurrent operators back of which no weight was rewritten: they are faster than loops."""
    rewritten = {program.site(fqn).weight_name for fqn in {*program.maps, *program.raised}}
    for name, one in program.recurrent.items():
        if one.created and rewritten.isdisjoint(one.weights()):
            program.recurrent[name] = close_recurrent(program.graph_module.graph, one)
            _edited(program)


def _edited(program: "Program") -> None:
    program.__dict__.pop("nodes", None)
    program.settle()
