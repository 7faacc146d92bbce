"""Plans, metrics and checks as tables in the terminal."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrc.report.budgets import point_rows
from lrc.report.units import count, share, size
from lrc.run.plan import Decision, Plan, totals


def plan_table(plan: Plan) -> RenderableType:
    """Return the plan: a row per site, the totals, and what was noticed."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    timed = any(d.latency for d in plan.decisions)
    for name, justify in (
        ("site", "left"), ("rule", "left"), ("shape", "right"), ("rank", "right"), ("form", "left"), ("kept", "right"),
        ("loss", "right"), ("FLOPs/token", "right"), ("bytes", "right"), *((("ms", "right"),) if timed else ()),
        ("note", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")
    for decision in plan.decisions:
        table.add_row(*_row(decision, timed), style="dim" if decision.keep else None)
    parts: list[RenderableType] = [table, *(Text(line) for line in summary_lines(plan))]
    if plan.points:
        parts += [Text(""), Text("budgets that were tried (* is the one of this plan)"), rows_table(point_rows(plan))]
    return Group(*parts)


def _row(d: Decision, timed: bool) -> tuple[str, ...]:
    loss = f"{d.predicted:.3g}" if d.predicted is not None else ""
    note = "; ".join(([f"stays dense: {d.keep}"] if d.keep else []) + list(d.notes))
    rank = "×".join(map(str, d.ranks)) or str(d.rank or "")
    ms = f"{d.latency[0]:.3g} → {d.latency[1]:.3g}" if d.latency else ""
    return (
        d.name, d.rule, d.before.text, rank, d.form or "", share(d.after.parameters, d.before.parameters),
        loss, f"{count(d.before.flops)} → {count(d.after.flops)}", f"{size(d.before.bytes)} → {size(d.after.bytes)}",
        *([ms] if timed else []), note,
    )  # fmt: skip


def summary_lines(plan: Plan) -> list[str]:
    """Return the totals of a plan as lines of text."""
    before, after = totals(plan.decisions)
    units = sorted({d.unit for d in plan.decisions if d.unit})
    lines = [
        f"targets: {count(before)} → {count(after)} parameters ({share(after, before)} kept)",
        f"model:   {count(plan.parameters[0])} → {count(plan.parameters[1])} parameters, "
        f"{size(plan.bytes[0])} → {size(plan.bytes[1])}",
    ]
    for unit in units:
        lost = sum(d.predicted or 0 for d in plan.decisions if d.unit == unit)
        lines.append(f"predicted loss, all sites: {lost:.4g} {unit}")
    if plan.peak_memory:
        lines.append(f"predicted peak memory: {size(plan.peak_memory)}")
    lines += [f"pattern {pattern!r} is overruled everywhere by a later one" for pattern in plan.shadowed]
    return lines + list(plan.notes)


def plain_report(plan: Plan, width: int = 160) -> str:
    """Return the plan as plain text."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    return console.export_text()


def result_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return what a finished run has to tell: files, checks, metrics, gates."""
    before, after = summary["parameters"]
    parts: list[RenderableType] = [
        Text(f"{summary['output']}: {count(before)} → {count(after)} parameters, "
             f"{size(summary['bytes'][0])} → {size(summary['bytes'][1])}")
    ]  # fmt: skip
    for name, path in summary["artifacts"].items():
        worst = [row["largest"] for row in summary["parity"] if row["format"] == name]
        checked = f"largest difference {max(worst):.2g}" if worst else "not checked"
        notes = "; ".join(summary["notes"].get(name, ()))
        parts.append(Text(f"  {name}: {path} ({checked}{'; ' + notes if notes else ''})"))
    for title in ("metrics", "gates"):
        if summary[title]:
            parts.append(rows_table(summary[title]))
    parts += [Text(f"failed: {text}") for text in summary["failures"]]
    return Group(*parts)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return any list of equal mappings as a table; numbers are right-aligned."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key, value in (rows[0] if rows else {}).items():
        table.add_column(key, justify="right" if isinstance(value, (int, float)) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
