"""Charts as SVG text: a few series of points with axes, linear or logarithmic, and nothing to load from elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#3b6fb6", "#c2571a", "#18794e", "#8e4ec6", "#8a6d00")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 46, 16, 16


@dataclass(frozen=True)
class Series:
    """Points of one kind: (x, y); joined by a line or not; marked: the places that get a larger dot; labels: a tooltip each."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    marked: frozenset[int] = frozenset()
    labels: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its name, and whether it is logarithmic (only positive values have a place then)."""

    name: str
    log: bool = False


def chart(series: Sequence[Series], x: Axis, y: Axis, title: str = "", *, alone: bool = False) -> str:
    """Return an SVG of some series. Points without a place (not finite, or not positive on a logarithmic axis) are left out.

    alone: for a file of its own, not for the middle of a page.
    """
    shown = [(s, [i for i, point in enumerate(s.points) if _placed(point, x, y)]) for s in series]
    xs = [s.points[i][0] for s, places in shown for i in places]
    ys = [s.points[i][1] for s, places in shown for i in places]
    across, up = _Scale(xs, x, LEFT, WIDTH - RIGHT), _Scale(ys, y, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up, x, y)]
    for number, (s, places) in enumerate(shown):
        parts += _drawn(s, places, across, up, COLOURS[number % len(COLOURS)])
    if len(series) > 1:
        parts += _legend([s.name for s in series])
    style = f"font:11px system-ui,sans-serif;max-width:{WIDTH}px"
    space = " xmlns='http://www.w3.org/2000/svg'" if alone else ""
    head = f"<svg{space} viewBox='0 0 {WIDTH} {HEIGHT}' role='img' style='{style}'>"
    return f"{head}<title>{escape(title or y.name)}</title>{''.join(parts)}</svg>"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Return some round numbers between two bounds: multiples of 1, 2 or 5; on a logarithmic axis of powers of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1.0,) if len(powers) > 4 else (1.0, 2.0, 5.0)
        return [v for p in powers for s in steps if low * (1 - 1e-9) <= (v := s * 10.0**p) <= high * (1 + 1e-9)]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """From values to places in the picture."""

    def __init__(self, values: Sequence[float], axis: Axis, begin: float, end: float) -> None:
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        margin = 0.05 * (high - low) or abs(high) / 10 or 1.0
        if axis.log:
            factor = (high / low) ** 0.05 if high > low else 1.5
            low, high = low / factor, high * factor
        else:
            low, high = (low - margin if low < 0 or low - margin > 0 else 0.0), high + margin
        self.low, self.high, self.log, self.begin, self.end = low, high, axis.log, begin, end

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)


def _placed(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    pairs = zip(point, (x, y), strict=True)
    return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in pairs)


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f"<path d='M{LEFT} {TOP}V{bottom}H{right}' fill='none' stroke='currentColor' stroke-opacity='.5'/>",
        f"<text x='{(LEFT + right) / 2}' y='{HEIGHT - 8}' text-anchor='middle' fill='currentColor'>{escape(x.name)}</text>",
        f"<text x='14' y='{(TOP + bottom) / 2}' text-anchor='middle' fill='currentColor' "
        f"transform='rotate(-90 14 {(TOP + bottom) / 2})'>{escape(y.name)}</text>",
    ]
    for value in ticks(across.low, across.high, across.log):
        at = across(value)
        parts.append(f"<path d='M{at:.1f} {bottom}v4' stroke='currentColor'/>")
        parts.append(f"<text x='{at:.1f}' y='{bottom + 16}' text-anchor='middle' fill='currentColor'>{value:g}</text>")
    for value in ticks(up.low, up.high, up.log):
        at = up(value)
        parts.append(f"<path d='M{LEFT} {at:.1f}H{right}' stroke='currentColor' stroke-opacity='.12'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{at + 4:.1f}' text-anchor='end' fill='currentColor'>{value:g}</text>")
    return parts


def _drawn(s: Series, places: Sequence[int], across: _Scale, up: _Scale, colour: str) -> list[str]:
    spots = [(across(s.points[i][0]), up(s.points[i][1])) for i in places]
    parts = []
    if s.line and len(spots) > 1:
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in sorted(spots))
        parts.append(f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>")
    for i, (a, b) in zip(places, spots, strict=True):
        label = f"<title>{escape(s.labels[i])}</title>" if i < len(s.labels) else ""
        parts.append(f"<circle cx='{a:.1f}' cy='{b:.1f}' r='{6 if i in s.marked else 3.5}' fill='{colour}'>{label}</circle>")
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for line, name in enumerate(names):
        y, colour = TOP + 12 + 16 * line, COLOURS[line % len(COLOURS)]
        parts.append(f"<circle cx='{LEFT + 14}' cy='{y - 4}' r='4' fill='{colour}'/>")
        parts.append(f"<text x='{LEFT + 24}' y='{y}' fill='currentColor'>{escape(name)}</text>")
    return parts
