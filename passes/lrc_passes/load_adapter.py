"""load_adapter: a PEFT folder onto the model.

X  ->  Sum(base: X*, adapter: Scale(s, Chain(B, A)))      or RowNorm of it (DoRA), or VeRA's chain, as the folder says
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lrc.lower.peft_folder import PeftFolder, read_folder
from lrc.lower.peft_read import attach, maps_of
from lrc.program import Program
from lrc.run import Decision, PassOptions, Session, program_pass
from lrc.run.summary import summarize


class LoadAdapter(PassOptions):
    """Read an adapter that PEFT, or `format: peft`, has written."""

    type: Literal["load_adapter"] = "load_adapter"
    path: str = Field(description="The folder with adapter_config.json, from the spec's own folder.")


@program_pass(LoadAdapter)
class LoadAdapterPass:
    """Puts the folder's adapters at the sites that it names; `targets` has no part in it."""

    def plan(self, program: Program, session: Session, options: LoadAdapter, index: int) -> Sequence[Decision]:
        """Say what will stand at every site of the folder."""
        decisions = []
        for fqn, made in maps_of(program, self.read(session, options)).items():
            site = program.sites[fqn]
            after = summarize(made)
            decisions.append(
                Decision(index, options.type, (fqn,), options.path, summarize(site.map), after, full_rank=min(site.shape))
            )
        return decisions

    def apply(
        self, program: Program, session: Session, options: LoadAdapter, decisions: Sequence[Decision]
    ) -> Sequence[Decision]:
        """Put the adapters in place."""
        attach(program, self.read(session, options))
        return [replace(d, rank=rank_of(program, d.sites[0])) for d in decisions]

    def read(self, session: Session, options: Any) -> PeftFolder:
        """Read the folder."""
        path = Path(options.path)
        if not path.is_absolute() and session.spec_path is not None:
            path = session.spec_path.parent / path
        return read_folder(path)


def rank_of(program: Program, fqn: str) -> int | None:
    """Return the rank of the adapter at a site."""
    return program.adapters[fqn].rank if fqn in program.adapters else None
