"""One grammar of names, and which pattern chose which site."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.spec.patterns import Candidate, check_pattern, layer_of, select, to_regex

NAMES = [
    "embed",
    "layers.0.attention.q",
    "layers.0.attention.k",
    "layers.0.mlp.up",
    "layers.1.attention.q",
    "layers.1.mlp.down",
    "layers.12.attention.q",
    "head",
]
MODEL = [Candidate(name, "Embedding" if name == "embed" else "Linear") for name in NAMES]


def chosen(*targets: str, ignore: tuple[str, ...] = ()) -> list[str]:
    found = select(MODEL, targets, ignore)
    return [name for name in found.rules if name not in found.ignored]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", ["head"]),
        ("layers.0.mlp.up", ["layers.0.mlp.up"]),
        ("layers", []),
        ("ead", []),
        ("**", NAMES),
        ("*", ["embed", "head"]),
        ("layers.*.attention.q", ["layers.0.attention.q", "layers.1.attention.q", "layers.12.attention.q"]),
        ("layers.1*.attention.q", ["layers.1.attention.q", "layers.12.attention.q"]),
        ("layers.*.q", []),
        ("layers.0.*", []),
        ("layers.0.**", ["layers.0.attention.q", "layers.0.attention.k", "layers.0.mlp.up"]),
        ("head.**", ["head"]),
        ("**.head", ["head"]),
        ("**.q", ["layers.0.attention.q", "layers.1.attention.q", "layers.12.attention.q"]),
        ("**.attention.q", ["layers.0.attention.q", "layers.1.attention.q", "layers.12.attention.q"]),
        ("layers.**.q", ["layers.0.attention.q", "layers.1.attention.q", "layers.12.attention.q"]),
        ("layers.**.0.**.q", ["layers.0.attention.q"]),
        ("layers.0.**.attention.q", ["layers.0.attention.q"]),
        ("**attention**", [n for n in NAMES if "attention" in n]),
        ("layers.0.attention.{q,k}", ["layers.0.attention.q", "layers.0.attention.k"]),
        ("layers.0.{attention, mlp}.*", ["layers.0.attention.q", "layers.0.attention.k", "layers.0.mlp.up"]),
        ("{head,embed}", ["embed", "head"]),
        ("layers.{0,1}.mlp.{u*,down}", ["layers.0.mlp.up", "layers.1.mlp.down"]),
        ("re:.*\\.(q|up)", [n for n in NAMES if n.endswith(("q", "up"))]),
        ("re:head|emb", ["head"]),
        ("re:.*", NAMES),
        ("type:Linear", NAMES[1:]),
        ("type:Embedding", ["embed"]),
        ("type:linear", []),
        ("layers:[0-1]", NAMES[1:6]),
        ("layers:[12]", ["layers.12.attention.q"]),
        ("layers:[2-11]", []),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, names: list[str]) -> None:
    found = select(MODEL, [pattern])
    assert list(found.rules) == names
    assert found.unmatched == (() if names else (pattern,))


names = st.lists(st.from_regex(r"[a-z0-9_+()\[\]]{1,4}", fullmatch=True), min_size=1, max_size=4).map(".".join)


@settings(max_examples=30, deadline=None)
@given(name=names, other=names)
def test_a_plain_name_matches_itself_alone(name: str, other: str) -> None:
    found = select([Candidate(name), Candidate(other)], [name])
    assert set(found.rules) == {name}


@settings(max_examples=30, deadline=None)
@given(name=names, data=st.data())
def test_stars_stand_for_one_part_and_double_stars_for_any_number(name: str, data: st.DataObject) -> None:
    parts = name.split(".")
    i = data.draw(st.integers(0, len(parts) - 1))
    j = data.draw(st.integers(i, len(parts)))
    starred = ".".join([*parts[:i], "*", *parts[i + 1 :]])
    double = ".".join([*parts[:i], "**", *parts[j:]])
    assert to_regex(starred).fullmatch(name)
    assert to_regex(double).fullmatch(name)
    assert not to_regex(starred).fullmatch(f"{name}.more")
    assert not to_regex(starred).fullmatch(f"more.{name}")


def test_the_last_pattern_that_matches_wins_and_overruled_ones_are_named() -> None:
    found = select(MODEL, ["layers.0.mlp.up", "**.q", "layers.0.**", "layers.1.**"])
    assert found.rules == {
        "layers.0.attention.q": "layers.0.**",
        "layers.0.attention.k": "layers.0.**",
        "layers.0.mlp.up": "layers.0.**",
        "layers.1.attention.q": "layers.1.**",
        "layers.1.mlp.down": "layers.1.**",
        "layers.12.attention.q": "**.q",
    }
    assert found.shadowed == ("layers.0.mlp.up",)
    assert found.unmatched == ()


def test_ignored_sites_keep_their_rule_and_name_the_pattern() -> None:
    found = select(MODEL, ["layers:[0]"], ["**.q", "embed", "re:.*up"])
    assert found.ignored == {"layers.0.attention.q": "**.q", "layers.0.mlp.up": "re:.*up"}
    assert set(found.rules) == {"layers.0.attention.q", "layers.0.attention.k", "layers.0.mlp.up"}
    assert chosen("layers:[0]", ignore=("**.q", "re:.*up")) == ["layers.0.attention.k"]


def test_patterns_that_match_nothing_are_named_in_order_those_of_ignore_too() -> None:
    found = select(MODEL, ["**", "nothing", "type:Conv2d"], ["layers:[99]"])
    assert found.unmatched == ("nothing", "type:Conv2d", "layers:[99]")
    assert found.shadowed == ()


def test_sites_come_in_their_own_order_whatever_the_order_of_patterns() -> None:
    assert chosen("head", "embed") == ["embed", "head"]


def test_no_site_is_matched_by_everything() -> None:
    assert select([], ["**"]).unmatched == ("**",)


@pytest.mark.parametrize(
    ("name", "layer"), [("encoder.layer.11.attention", 11), ("h.0.mlp.1", 0), ("head", None), ("layer1.x", None)]
)
def test_the_layer_of_a_name_is_its_first_number(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a.{b", "unclosed or nested brace"),
        ("a.b}", "unclosed or nested brace"),
        ("}a{", "unclosed or nested brace"),
        ("{a,{b,c}}", "unclosed or nested brace"),
        ("re:(", "is no regular expression: missing"),
        ("re:*", "is no regular expression: nothing to repeat"),
        ("layers:3", r"expected `layers:\[first-last\]`, got 'layers:3'"),
        ("layers:[a-b]", r"expected `layers:\[first-last\]`"),
        ("layers:[3-1]", r"expected `layers:\[first-last\]`"),
        ("layers:[-1]", r"expected `layers:\[first-last\]`"),
        ("type:", "expected `type:` and the name of a class"),
        ("type:torch.nn.Linear", "expected `type:` and the name of a class"),
    ],
)
def test_malformed_patterns_are_refused(pattern: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["**", "a.*", "{a,b}", "re:.*", "type:Linear", "layers:[0-3]", "layers:[7]", "a-b.c_d"])
def test_well_formed_patterns_pass(pattern: str) -> None:
    check_pattern(pattern)
