"""The chart and the table of `bench_bytes.py`."""

import statistics
from collections.abc import Sequence
from typing import Any

from lrc.report.svg import Axis, Series, chart

HUGE = 30.0


def scores_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return what models are judged by in these rows."""
    return [name for name in ("quality", "drift") if name in rows[0]]


def plot(model: str, rows: list[dict[str, Any]], ways: Sequence[str], score: str = "quality") -> str:
    """Return the chart of a mean score against size. A perplexity of more than HUGE times the dense one is left out."""
    dense = next(row[score] for row in rows if row["way"] == "dense")
    names = dict.fromkeys(row["way"] for row in rows if row["way"] != "dense" and score in row)
    means = {way: mean_of(rows, way, score) for way in names}
    perplexity = model != "minilm"
    out = [way for way, mean in means.items() if mean[score] > HUGE * dense] if perplexity else []
    means = {way: mean for way, mean in means.items() if way not in out}
    series = [Series("auto", sorted((m["mb"], m[score]) for way, m in means.items() if way.startswith("auto")))]
    for family in dict.fromkeys(map(family_of, ways)):
        members = [way for way in ways if family_of(way) == family and way in means]
        points = [(means[way]["mb"], means[way][score]) for way in members]
        series.append(Series(family, points, line=False, labels=members))
    spearman = "perplexity" if perplexity else "Spearman on STS-B dev"
    name = "distance of embeddings from the dense model's" if score == "drift" else spearman
    title = f"{model}: {name} against the size of its blocks' linears"
    title += f"; dense {dense}" if score == "quality" else ""
    title += f"; off the chart: {', '.join(out)}" if out else ""
    return chart(series, Axis("MB", log=True), Axis(name, log=perplexity or score == "drift"), title, alone=True)


def family_of(way: str) -> str:
    """Return what a way is, as the legend says it: a colour for each."""
    if "+" in way:
        return "factorize, then quantize"
    if "feedback" in way:
        return "quantize, feedback"
    families = {"nf": "quantize", "in": "quantize", "lq": "low-rank + quantised", "lo": "low-rank + quantised", "lr": "codes"}
    return families.get(way[:2], "low-rank + sparse" if way.startswith(("oats", "slim")) else "factorize")


def mean_of(rows: list[dict[str, Any]], way: str, score: str = "quality") -> dict[str, float]:
    found = [row for row in rows if row["way"] == way and score in row]
    values = [row[score] for row in found]
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mb": statistics.mean(row["mb"] for row in found), score: statistics.mean(values), "error": spread}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for every way: size, the mean of every score with its standard error, and `auto` at the same bytes."""
    scores = scores_of(rows)
    lines = [
        "| way | MB |" + "".join(f" {score} | auto, same bytes |" for score in scores),
        "|---|---|" + "---|---|" * len(scores),
    ]
    ways = dict.fromkeys(row["way"] for row in rows)

    def said(way: str, score: str) -> str:
        found = mean_of(rows, way, score) if way in ways else None
        return f"{found[score]:.4f} ± {found['error']:.4f}" if found else ""

    for way in ways:
        if not way.startswith("auto ="):
            cells = [said(name, score) for score in scores for name in (way, f"auto = {way}")]
            lines.append(f"| {way} | {mean_of(rows, way)['mb']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
