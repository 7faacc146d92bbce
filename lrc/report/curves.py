"""Curves of training as SVG, for the HTML report."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT = 780, 160, 60
POINTS = 400  # more than that cannot be told apart at this width


def curve(run: Mapping[str, Any]) -> list[str]:
    """Return a title and a plot of one training run: the loss as a line, validation as dots on a scale of their own."""
    history = run["history"]
    title = f"Training: {run['objective']} by {run['optimizer']}, {run['steps']} steps, {run['parameters']} numbers"
    if not history:
        return [f"<h2>{escape(title)}</h2>"]
    losses = _thinned([(row["step"], row["loss"]) for row in history])
    judged = [(row["step"], row["validation"]) for row in history if "validation" in row]
    last = history[-1]["step"]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in _placed(losses, last))
    dots = "".join(
        f"<circle class=dot cx={x:.1f} cy={y:.1f} r=3><title>step {step:g}: {value:.4g}</title></circle>"
        for (x, y), (step, value) in zip(_placed(judged, last), judged, strict=True)
    )
    low, high = min(v for _, v in losses), max(v for _, v in losses)
    marks = f"<text x=0 y=12>{high:.4g}</text><text x=0 y={HEIGHT - 4}>{low:.4g}</text>"
    svg = f"<svg viewBox='0 0 900 {HEIGHT}' role=img>{marks}<polyline class=line points='{line}' />{dots}</svg>"
    return [f"<h2>{escape(title)}</h2>", svg]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the mean of neighbours where there are too many points."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]


def _placed(points: Sequence[tuple[float, float]], last: float) -> list[tuple[float, float]]:
    """Return where points stand in the plot."""
    if not points:
        return []
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    return [(LEFT + WIDTH * step / last, 8 + (HEIGHT - 16) * (high - value) / span) for step, value in points]
