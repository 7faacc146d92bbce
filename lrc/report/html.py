"""One HTML page about a run, with nothing to load from elsewhere: totals, plots of rank and loss, checks, all decisions."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lrc.errors import UsageError
from lrc.report.budgets import point_charts, point_rows
from lrc.report.curves import curve
from lrc.report.tables import summary_lines
from lrc.report.units import count, share, size
from lrc.run.plan import Decision, Plan

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #e3e6ea}td.n,th.n{text-align:right}
tr.kept td{color:#6b7480}.ok{color:#18794e}.bad{color:#c62828}svg text{font:11px system-ui,sans-serif;fill:currentColor}
.bar{fill:#3b6fb6}.line{fill:none;stroke:#3b6fb6}.dot{fill:#c2571a}.rest{fill:#dde3ea}pre{background:#f5f7f9;padding:.8rem;overflow:auto}
@media(prefers-color-scheme:dark){body{color:#dfe3e8;background:#14171a}th,td{border-color:#2b3036}pre{background:#1d2125}
.rest{fill:#2b3036}.bar{fill:#6c9fe0}tr.kept td{color:#8a939e}}
"""
ROW = 18


def html_report(plan: Plan, manifest: Mapping[str, Any], metrics: Mapping[str, Any], spec: str) -> str:
    """Return the page. `manifest` and `metrics` are what `lrc/manifest.json` and `lrc/metrics.json` hold."""
    ranked = [d for d in plan.decisions if d.rank is not None]
    parts = [
        f"<h1>lrc: {escape(str(manifest.get('model', 'model')))}</h1>",
        "<pre>" + escape("\n".join(summary_lines(plan))) + "</pre>",
        *_section("Quality", metrics.get("metrics", ())),
        *(part for run in manifest.get("training", ()) for part in curve(run)),
        *_section("Gates", metrics.get("gates", ())),
        *_section("Checks of the artifacts, reloaded in a fresh process", manifest.get("parity", ())),
        *_section("Budgets that were tried", point_rows(plan)), *point_charts(plan.points),
        "<h2>Share of the rank that is kept</h2>", _bars(ranked, "rank"),
        "<h2>Predicted loss</h2>", _bars(ranked, "loss"),
        "<h2>Decisions</h2>", _decisions(plan.decisions),
        "<h2>Spec</h2><pre>" + escape(spec) + "</pre>",
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>lrc report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def report_of(folder: Path) -> str:
    """Return the page of a finished output folder. Raises UsageError when it is none."""
    inside = folder / "lrc"
    try:
        manifest = json.loads((inside / "manifest.json").read_text(encoding="utf-8"))
        metrics = json.loads((inside / "metrics.json").read_text(encoding="utf-8"))
        spec = (inside / "spec.resolved.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(str(folder), expected="a finished output folder of lrc", got=str(error)) from error
    return html_report(Plan.load(folder), manifest, metrics, spec)


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = "".join(f"<th>{escape(str(key))}" for key in rows[0])
    lines = ["".join(_cell(value) for value in row.values()) for row in rows]
    return [f"<h2>{escape(title)}</h2><table><tr>{head}" + "".join(f"<tr>{line}" for line in lines) + "</table>"]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return f"<td class={'ok' if value else 'bad'}>{'yes' if value else 'no'}"
    if isinstance(value, float):
        return f"<td class=n>{value:.4g}"
    return f"<td>{escape(str(value))}"


def _bars(decisions: Sequence[Decision], what: str) -> str:
    """Draw one horizontal bar a site: the share of the full rank, or the loss against the largest one."""
    values = [_value(d, what) for d in decisions]
    top = max((v for v, _ in values), default=0) or 1
    rows = []
    for line, (d, (value, label)) in enumerate(zip(decisions, values, strict=True)):
        y, width = line * ROW, 400 * value / (1 if what == "rank" else top)
        rows.append(
            f"<text x=0 y={y + 13}>{escape(d.name)}</text><rect class=rest x=380 y={y + 3} width=400 height=12 />"
            f"<rect class=bar x=380 y={y + 3} width={width:.1f} height=12 /><text x=788 y={y + 13}>{label}</text>"
        )
    return f"<svg viewBox='0 0 900 {ROW * max(len(decisions), 1)}' role=img>{''.join(rows)}</svg>"


def _value(d: Decision, what: str) -> tuple[float, str]:
    if what == "loss":
        return d.predicted or 0.0, f"{d.predicted or 0:.3g}"
    full = d.full_rank or d.rank or 1
    return (d.rank or 0) / full, f"{d.rank} of {full}"


def _decisions(decisions: Sequence[Decision]) -> str:
    timed = any(d.latency for d in decisions)
    head = (
        "<tr><th>site<th>pass<th>rule<th>before<th>after<th class=n>kept<th class=n>FLOPs/token<th class=n>bytes"
        f"{'<th class=n>ms' if timed else ''}<th>note"
    )
    rows = []
    for d in decisions:
        note = "; ".join(([f"stays: {d.keep}"] if d.keep else []) + list(d.notes))
        cells = (d.name, d.type, d.rule, d.before.text, d.after.text)
        rows.append(
            f"<tr class={'kept' if d.keep else 'changed'}>" + "".join(f"<td>{escape(c)}" for c in cells)
            + f"<td class=n>{share(d.after.parameters, d.before.parameters)}<td class=n>{count(d.after.flops)}"
            + f"<td class=n>{size(d.after.bytes)}{_ms(d) if timed else ''}<td>{escape(note)}"
        )  # fmt: skip
    return f"<table>{head}{''.join(rows)}</table>"


def _ms(d: Decision) -> str:
    return f"<td class=n>{d.latency[0]:.3g} → {d.latency[1]:.3g}" if d.latency else "<td class=n>"
