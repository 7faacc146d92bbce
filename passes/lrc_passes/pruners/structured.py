"""structured: heads, channels and features are taken out whole, and everything that is linked with them gets narrower.

%h: f32[.., n] = linear(%x, up);   %y = linear(gelu(%h), down)
%h: f32[.., k] = linear(%x, up');  %y = linear(gelu(%h), down')      k rows of `up`, k columns of `down`

What goes together is found on the graph (`lrc.program.dependency`), never by the names of a model. What stays computes what
it did beside zeros: the result is the masked model, smaller.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from lrc.measure.workload import Workload
from lrc.program import Program, Site
from lrc.program.dependency import Group, Groups, cut_units, find_groups
from lrc.run import Decision, Session
from lrc.run.pruners import PrunerOptions, pruner
from lrc.run.selection import Selected, select_sites
from lrc.run.summary import summarize
from lrc.solvers import Need
from lrc.solvers.scores import SCORES
from lrc.spec.base import SpecModel
from lrc_passes.pruners.unit_scores import unit_scores
from lrc_passes.pruners.widths import Widths

if TYPE_CHECKING:
    from lrc_passes.prune import Prune

Kind = Literal["heads", "channels", "features"]


class Amount(SpecModel):
    """How much of the targets stays: one of the three."""

    width_kept: float | None = Field(
        default=None, gt=0, le=1, description="Of the heads, channels and features, each counted one."
    )
    params_kept: float | None = Field(default=None, gt=0, le=1, description="Of the parameters of the targets.")
    flops_kept: float | None = Field(default=None, gt=0, le=1, description="Of the FLOPs of the targets.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.width_kept, self.params_kept, self.flops_kept)) != 1:
            raise ValueError("give one of `width_kept`, `params_kept` and `flops_kept`")
        return self

    @property
    def share(self) -> float:
        """The number that was given."""
        return next(value for value in (self.width_kept, self.params_kept, self.flops_kept) if value is not None)


class Structured(PrunerOptions):
    """Take out whole heads, channels and features."""

    type: Literal["structured"] = "structured"
    criterion: Literal[*SCORES] = Field(  # type: ignore[valid-type]  # the list of criteria is one mapping
        default="magnitude",
        description="What says how much a unit matters: the norm of its weights (magnitude), what it gives to those that read "
        "it (wanda), or what the loss would change without it (taylor); the latter two on the calibration data.",
    )
    amount: Amount = Field(description="How much stays.")
    allocate: Literal["uniform", "global"] = Field(
        default="uniform",
        description="The same share everywhere, or by importance over all groups: for the cost of a unit (taylor), or relative "
        "to the mean of its group.",
    )
    kinds: list[Kind] = Field(default=["heads", "channels", "features"], min_length=1, description="Which units may go.")
    round_to: int = Field(default=1, ge=1, description="Of every group a multiple of this stays.")
    at: Workload = Field(default=Workload(), description="Shapes that a budget of FLOPs counts at.")

    @property
    def needs(self) -> frozenset[Need]:
        """What the criterion needs."""
        return SCORES[self.criterion].needs

    def obstacle_at(self, site: Site) -> str | None:
        """Return None: whether a site can be cut is seen on the graph."""
        return None


@pruner(Structured)
class StructuredPruner:
    """The method. The decisions are one for every target; the units that go are chosen over all groups together."""

    def plan(self, program: Program, session: Session, options: "Prune", index: int) -> Sequence[Decision]:
        """Find the groups among the targets and choose their widths."""
        selected = {s.fqn: s for s in select_sites(program, session, options, index)}
        groups = find_groups(program)
        targets = [fqn for fqn, s in selected.items() if s.keep is None]
        widths = self.widths(program, session, options, groups, targets)
        session.notices += widths.notes
        return [decided(program, groups, widths, selected[fqn], options, index) for fqn in selected]

    def apply(self, program: Program, session: Session, options: "Prune", decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Choose again, and cut."""
        targets = [d.sites[0] for d in decisions if d.keep is None or not d.keep.startswith("ignored")]
        groups = find_groups(program)
        widths = self.widths(program, session, options, groups, targets)
        session.notices += [f"prune: {note}" for note in cut_units(program, groups, widths.gone(), options.type)]
        return [d if d.keep else _after(d, program) for d in decisions]

    def widths(self, program: Program, session: Session, options: "Prune", groups: Groups, targets: Sequence[str]) -> Widths:
        """Return the widths of the groups that only targets form."""
        method = method_of(options)
        mine, notes = [], []
        for group in groups.groups:
            outside = [fqn for fqn in group.sites if fqn not in targets]
            if group.kind not in method.kinds or len(outside) == len(group.sites):
                continue
            if outside:
                notes.append(
                    f"prune: the {group.kind} of {group.name} stay, for {outside[0]} is linked with them and is no target"
                )
            elif group.units > 1:
                mine.append(group)
        scores = unit_scores(program, session, mine, method.criterion)
        return Widths.chosen(program, session, groups, mine, scores, targets, method, notes)


def method_of(options: "Prune") -> Structured:
    """Return the method's options."""
    assert isinstance(options.method, Structured), "the registry calls the method of its options"
    return options.method


def decided(program: Program, groups: Groups, widths: Widths, selected: Selected, options: "Prune", index: int) -> Decision:
    """Return the decision of one target."""
    site = program.sites[selected.fqn]
    before = summarize(site.map)
    notes = [told(group, side, widths) for group in widths.groups for side in ("out", "in") if touches(group, site.fqn, side)]
    after = widths.summary(site.fqn)
    keep = selected.keep
    if keep is None and after == before:
        keep = "the budget takes it as it is" if notes else groups.reasons.get(site.fqn, "nothing of it can be cut")
    if keep is not None:
        return Decision(index, options.type, (site.fqn,), selected.rule, before, before, keep=keep)
    fixed = groups.reasons.get(site.fqn)
    if fixed is not None:
        notes.append(f"what it gives stays: {fixed}")
    return Decision(index, options.type, (site.fqn,), selected.rule, before, after, notes=tuple(notes))


def touches(group: Group, fqn: str, side: str) -> bool:
    """Say whether a site loses rows (out) or columns (in) with a group."""
    return any(member.slot == ("site", fqn, side) for member in group.members)


def told(group: Group, side: str, widths: Widths) -> str:
    """Return in words what stays of a group."""
    return f"{'gives' if side == 'out' else 'reads'} {widths.kept[group.name]} of {group.units} {group.kind} ({group.name})"


def _after(decision: Decision, program: Program) -> Decision:
    return replace(decision, after=summarize(program.map_of(decision.sites[0])))
