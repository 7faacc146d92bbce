"""The budgets that a plan has tried, as rows of a table and as charts: what is lost against what it costs."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lrc.report.svg import Axis, Series, chart
from lrc.report.units import count, share, size
from lrc.run.plan import Plan, Point

COSTS = (("bytes", "size, MB", 1e-6), ("flops", "FLOPs of the targets per sample, millions", 1e-6), ("ms", "predicted ms", 1.0))


def point_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for every budget that was tried; columns that no point has are left out."""
    rows = [_row(point, plan) for point in plan.points]
    return [{name: row[name] for name in row if any(other[name] for other in rows)} for row in rows]


def point_charts(points: Sequence[Point]) -> list[str]:
    """Return, for every pass, charts of the predicted loss and of what was measured against size, FLOPs and time, if known."""
    charts = []
    for index, group in groupby(sorted(points, key=lambda p: p.index), key=lambda p: p.index):
        of_pass = [p for p in group if p.bytes is not None]
        for key, name, factor in COSTS:
            for what, title in _measures(of_pass).items():
                found = [p for p in of_pass if getattr(p, key) is not None and getattr(p, what) is not None]
                if len({getattr(p, key) for p in found}) > 1:
                    spots = [(factor * getattr(p, key), float(getattr(p, what))) for p in found]
                    marked = frozenset(i for i, p in enumerate(found) if p.chosen)
                    labels = [f"{p.budget} {p.amount:.4g}" for p in found]
                    series = Series(title, spots, marked=marked, labels=labels)
                    charts.append(chart([series], Axis(name), Axis(title), f"pass {index}: {title} against {name}"))
    return charts


def _measures(points: Sequence[Point]) -> Mapping[str, str]:
    metric = next((p.metric for p in points if p.metric is not None), None)
    unit = next((p.unit for p in points if p.unit is not None), None)
    found = {} if unit is None else {"loss": f"predicted loss, {unit}"}
    return found | ({} if metric is None else {"value": metric})


def _row(p: Point, plan: Plan) -> dict[str, Any]:
    known = p.parameters is not None and p.bytes is not None
    return {
        "budget": f"{p.budget} {p.amount:.4g}",
        "chosen": "*" if p.chosen else "",
        "parameters": f"{count(p.parameters or 0)} ({share(p.parameters or 0, plan.parameters[0])})" if known else "",
        "size": size(p.bytes or 0) if known else "",
        "FLOPs": "" if p.flops is None else count(float(f"{p.flops:.3g}")),
        "ms": "" if p.ms is None else f"{p.ms:.3g}",
        "predicted loss": "" if p.loss is None else f"{p.loss:.4g} {p.unit or ''}".rstrip(),
        "measured": "" if p.value is None else f"{p.metric} {p.value:.5g}",
        "note": p.note,
    }
