"""Charts as text: everything has its place inside the frame, and what has none is left out."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrc.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, chart, ticks

SVG = "{http://www.w3.org/2000/svg}"
positive = st.floats(1e-6, 1e9)


def circles(text: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(text).iter(f"{SVG}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


@given(points=st.lists(st.tuples(positive, positive), min_size=1, max_size=8), log=st.booleans())
def test_every_point_is_inside_of_the_frame_and_in_order(points: list[tuple[float, float]], log: bool) -> None:
    text = chart([Series("a", points)], Axis("x", log), Axis("y", log), alone=True)
    spots = circles(text)
    assert len(spots) == len(points)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in spots)
    for (a, _), (b, _), (x, _), (y, _) in zip(spots, spots[1:], points, points[1:], strict=False):
        assert (a <= b) == (x <= y) or abs(a - b) <= 0.11


def test_points_without_a_place_are_left_out() -> None:
    points = [(1.0, 2.0), (0.0, 3.0), (2.0, math.inf), (math.nan, 1.0), (4.0, -1.0)]
    assert len(circles(chart([Series("a", points)], Axis("x", log=True), Axis("y"), alone=True))) == 2
    assert len(circles(chart([Series("a", points)], Axis("x"), Axis("y", log=True), alone=True))) == 2
    assert circles(chart([Series("a", [])], Axis("x"), Axis("y", log=True), alone=True)) == []


def test_names_and_labels_are_text() -> None:
    text = chart([Series("a<b", [(1, 1)], labels=["1 & 2"]), Series("c", [(2, 2)])], Axis("x>"), Axis("y"), "t", alone=True)
    root = ElementTree.fromstring(text)
    words = [e.text for e in root.iter() if e.tag in (f"{SVG}text", f"{SVG}title")]
    assert {"a<b", "c", "1 & 2", "x>", "y", "t"} <= set(words)
    assert len(circles(text)) == 4  # two points, two in the legend


def test_the_chosen_point_is_larger() -> None:
    text = chart([Series("a", [(1, 1), (2, 2)], marked=frozenset({1}))], Axis("x"), Axis("y"), alone=True)
    radii = [float(c.attrib["r"]) for c in ElementTree.fromstring(text).iter(f"{SVG}circle")]
    assert radii[1] > radii[0]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (0.31, 0.92, False, [0.4, 0.6, 0.8]),
        (0.5, 60, True, [0.5, 1, 2, 5, 10, 20, 50]),
        (1e-3, 1e4, True, [10.0**p for p in range(-3, 5)]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log) == pytest.approx(expected)
