"""YAML 1.2 scalars, the line of every value, and errors with file and line."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.errors import SpecError
from lrc.spec.yaml12 import parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E3", 1000.0),
        ("1.0e-6", 1e-6),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e+2", -50.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("10", 10),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("<<", "<<"),
        ("'1e-6'", "1e-6"),
        ('"true"', "true"),
        ("encoder.*", "encoder.*"),
        ("[1, 1e-1, no]", [1, 0.1, "no"]),
        ("{a: 1, b: yes}", {"a": 1, "b": "yes"}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse(f"key: {text}\n", "s.yaml")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(parse("[.nan]", "s.yaml")[0][0])


@settings(max_examples=30, deadline=None)
@given(value=st.floats(allow_nan=False) | st.integers(-(10**20), 10**20))
def test_numbers_as_python_writes_them_come_back(value: float) -> None:
    text = repr(value).replace("inf", ".inf")
    assert parse(text, "s.yaml")[0] == value


def test_every_value_has_its_line() -> None:
    text = "a: 1\nb:\n  c: x\n  d:\n    - 1\n    - {e: 2,\n       f: 3}\n"
    data, lines = parse(text, "s.yaml")
    assert data == {"a": 1, "b": {"c": "x", "d": [1, {"e": 2, "f": 3}]}}
    assert lines == {
        (): 1,
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
        ("b", "d", 1, "e"): 6,
        ("b", "d", 1, "f"): 7,
    }


def test_json_is_yaml() -> None:
    data, lines = parse('{"version": 1,\n "passes": [{"type": "merge"}]}', "s.json")
    assert data == {"version": 1, "passes": [{"type": "merge"}]}
    assert lines[("passes", 0, "type")] == 2


def test_an_alias_stands_for_its_anchor() -> None:
    assert parse("a: &x [1, 2]\nb: *x\n", "s.yaml")[0] == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: 2\na: 3\n", "s.yaml:3: the key `a` is given twice. Remove one."),
        ("a:\n  b: 1\n  b: 1\n", "s.yaml:3: the key `b` is given twice. Remove one."),
        ("a: 1\nb: [1\n", "s.yaml:3: expected YAML, got expected ',' or ']', but got '<stream end>'."),
        ("a: 1\n\tb: 2\n", "s.yaml:2: expected YAML, got found character '\\t' that cannot start any token."),
        ("a: 1\n b: 2\n", "s.yaml:2: expected YAML, got mapping values are not allowed here."),
        ("a: 1\n---\nb: 2\n", "s.yaml:2: expected YAML, got but found another document."),
        ("a: 1\nb: *x\n", "s.yaml:2: expected YAML, got found undefined alias 'x'."),
        ("a: 1\nb: 'x\n", "s.yaml:3: expected YAML, got found unexpected end of stream."),
        ("a: 1\nb: x\x07\n", "s.yaml:2: expected YAML, got the control character U+0007."),
        ("a: 1\n1: 2\n", "s.yaml:2: expected a word as key, got 1."),
        ("a: 1\ntrue: 2\n", "s.yaml:2: expected a word as key, got true."),
        ("a: 1\n[b]: 2\n", "s.yaml:2: expected a word as key, got a collection."),
        ("a: 1\n~: 2\n", "s.yaml:2: expected a word as key, got ~."),
        ("a: 1\n?\n: 2\n", "s.yaml:2: expected a word as key, got nothing."),
        ("a: 1\nb: !!int x\n", "s.yaml:2: expected a value of the type int, got x."),
        ("a: 1\nb: !!bool x\n", "s.yaml:2: expected a value of the type bool, got x."),
        ("a: 1\nb: &x [*x]\n", "s.yaml:2: the file is nested too deeply."),
        ("a: " + "[" * 500 + "]" * 500, "s.yaml:1: the file is nested too deeply."),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(text: str, wanted: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text, "s.yaml")
    assert str(caught.value) == wanted
    assert caught.value.exit_code == 2


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(SpecError, match=r"s.yaml:2: expected a value of the type int, got 9999"):
        parse("a: 1\nb: " + "9" * 5000, "s.yaml")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['x']", "!!python/name:os.system", "!mine x"])
def test_tags_make_no_objects(tag: str) -> None:
    try:
        found = parse(f"a: {tag}\n", "s.yaml")[0]
    except SpecError as error:
        found = {"a": str(error)}
    assert isinstance(found["a"], str | list)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.4", 0.4), ("1e-6", 1e-6), ("yes", "yes"), ("{energy: .9}", {"energy": 0.9}), ("[a, b]", ["a", "b"]), ("", None)],
)
def test_the_value_of_an_override_is_yaml(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["**", "*.dense", "[a", "@x", "a: b: c", "{a: 1, a: 2}"])
def test_the_value_of_an_override_that_is_no_yaml_is_a_word(text: str) -> None:
    assert parse_value(text) == text


def test_aliases_of_aliases_cannot_fill_the_memory() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdef", "bcdefg", strict=True)]
    with pytest.raises(SpecError, match=r"bomb\.yaml:\d+: the file has more than 100000 values"):
        parse("\n".join(lines), "bomb.yaml")
