"""The plan: what every pass decided, site by site, as plain data that is printed, saved, compared and resumed from."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrc.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class Keep:
    """A site that a pass leaves as it is, and why."""

    reason: str


@dataclass(frozen=True)
class Summary:
    """A map in numbers: its one-line text, stored numbers, stored bytes and FLOPs per token (a multiply-add counts 2)."""

    text: str
    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Decision:
    """What one pass does with one group of sites.

    sites: fully qualified names, most often one. rule: the pattern that chose them. rank, full_rank, form: of a low-rank
    product (full_rank: the largest there could be), or None; ranks: all of them where a form has several, else
    none. predicted: the solver's loss at that rank, in `unit`. keep: the reason why nothing changes, or None.
    after_sites: groups that must be applied before this one (`propagate: compressed`). notes: fallbacks and the like.
    latency: measured ms of the operators before and after, where a budget of time asked for them.
    """

    index: int
    type: str
    sites: tuple[str, ...]
    rule: str
    before: Summary
    after: Summary
    rank: int | None = None
    full_rank: int | None = None
    form: str | None = None
    predicted: float | None = None
    unit: str | None = None
    keep: str | None = None
    after_sites: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    latency: tuple[float, float] | None = None
    ranks: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The group's name: its sites, joined."""
        return "+".join(self.sites)


@dataclass(frozen=True)
class Point:
    """A budget that was tried while a pass was planned, and what the model would be with it.

    index: the pass. budget, amount: its name and value. parameters, bytes: of the whole model, None where the budget cannot
    be met. flops: of the targets per sample, None where the shapes do not tell. ms: predicted time of the targets, where it was
    measured. loss: predicted, of all targets, in `unit`; None where the units differ. metric, value: what was measured on the
    model, if anything. chosen: it is the one that the plan carries out. note: why the budget was refused, or missed a bound.
    """

    index: int
    budget: str
    amount: float
    parameters: int | None = None
    bytes: int | None = None
    flops: float | None = None
    ms: float | None = None
    loss: float | None = None
    unit: str | None = None
    metric: str | None = None
    value: float | None = None
    chosen: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All decisions in order, the model's totals, and what was noticed on the way.

    parameters, bytes: (before, after) of the whole model. peak_memory: predicted bytes while planning and applying.
    shadowed: patterns that another, later pattern overruled everywhere. points: other budgets that were tried.
    """

    decisions: tuple[Decision, ...]
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    peak_memory: int = 0
    shadowed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    format: int = field(default=FORMAT)

    def of_pass(self, index: int) -> tuple[Decision, ...]:
        """Return the decisions of the pass at position `index` of the spec."""
        return tuple(d for d in self.decisions if d.index == index)

    def to_json(self) -> str:
        """Return the plan as JSON text with a final newline: the same bytes for the same decisions."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan.json") -> "Plan":
        """Read what `to_json` wrote. Raises UsageError that names `where`."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise UsageError(where, expected=f"a plan of format {FORMAT}", got=str(data["format"]))
            decisions = tuple(_decision(row) for row in data.pop("decisions"))
            points = tuple(Point(**row) for row in data.pop("points", ()))
            return cls(decisions, points=points, **_tuples(data))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(where, expected="a plan written by lrc", got=str(error)) from error

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan from a file, or from a finished output folder."""
        file = path / "lrc" / "plan.json" if path.is_dir() else path
        if not file.is_file():
            raise UsageError(str(path), expected="a plan.json or an output folder of lrc", got="no such file")
        return cls.from_json(file.read_text(encoding="utf-8"), str(file))


def _decision(row: dict[str, Any]) -> Decision:
    return Decision(**{**_tuples(row), "before": Summary(**row["before"]), "after": Summary(**row["after"])})


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def totals(decisions: Sequence[Decision]) -> tuple[int, int]:
    """Return the parameters of all decided sites, before the first pass that decided on one and after the last."""
    before = {d.name: d.before.parameters for d in reversed(decisions)}
    after = {d.name: d.after.parameters for d in decisions}
    return sum(before.values()), sum(after.values())
