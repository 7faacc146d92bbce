"""prune: what matters least is dropped, and what stays is stored without it.

The method says of what: rows and columns of linked sites (structured), components of products (ranks), or entries of weights
(unstructured). It also says by which criterion and how much; the pass finds the sites.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from lrc.program import Program, Site
from lrc.run import Decision, PassOptions, ProgramPass, Session, program_pass
from lrc.run.pruners import PrunerOptions
from lrc.spec.registry import PRUNERS, Registered


class Prune(PassOptions):
    """Drop what matters least."""

    type: Literal["prune"] = "prune"
    method: Annotated[PrunerOptions, Registered(PRUNERS)] = Field(
        description="What is dropped, by which criterion, and how much: a name, or a mapping with `type`."
    )

    def obstacle_at(self, site: Site) -> str | None:
        """Return why the method can do nothing at a site, or None."""
        return self.method.obstacle_at(site)


@program_pass(Prune)
class PrunePass:
    """Hands both halves of the pass to the method."""

    def plan(self, program: Program, session: Session, options: Prune, index: int) -> Sequence[Decision]:
        """Let the method decide."""
        return method_of(options).plan(program, session, options, index)

    def apply(self, program: Program, session: Session, options: Prune, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Let the method carry out what it decided."""
        return method_of(options).apply(program, session, options, decisions)


def method_of(options: Prune) -> ProgramPass:
    """Return the two halves of the method."""
    made: ProgramPass = PRUNERS.for_options(options.method)()
    return made
