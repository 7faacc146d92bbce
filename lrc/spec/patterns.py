"""One grammar of names for `targets` and `ignore`.

`encoder.layer.*.attention.**`: `*` inside one part of a name, `**` across parts, `{a,b*}` one of several; `re:…` a regular
expression for the whole name; `type:Linear` a class; `layers:[0-3]` an index range. Ordered, the last match wins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """A site by its name and the class of the module that owns it."""

    fqn: str
    type_name: str = ""


@dataclass(frozen=True)
class Selection:
    """What patterns chose.

    rules: site -> the last target pattern that matches it, in the candidates' order. ignored: site -> the pattern of
    `ignore` that matches it. unmatched: patterns that match nothing. shadowed: target patterns overruled everywhere.
    """

    rules: dict[str, str]
    ignored: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    shadowed: tuple[str, ...] = ()


def select(candidates: Sequence[Candidate], targets: Sequence[str], ignore: Sequence[str] = ()) -> Selection:
    """Match candidates against ordered patterns. Raises ValueError for a pattern that is malformed."""
    matched = {pattern: _matches(candidates, pattern) for pattern in [*targets, *ignore]}
    rules: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for candidate in candidates:
        for pattern in targets:
            if candidate.fqn in matched[pattern]:
                rules[candidate.fqn] = pattern
        for pattern in ignore:
            if candidate.fqn in rules and candidate.fqn in matched[pattern]:
                ignored[candidate.fqn] = pattern
    unmatched = tuple(pattern for pattern, names in matched.items() if not names)
    used = set(rules.values())
    shadowed = tuple(pattern for pattern in targets if matched[pattern] and pattern not in used)
    return Selection(rules, ignored, unmatched, shadowed)


def _matches(candidates: Sequence[Candidate], pattern: str) -> set[str]:
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return {c.fqn for c in candidates if c.type_name == wanted}
    if pattern.startswith("layers:"):
        low, high = layer_range(pattern)
        return {c.fqn for c in candidates if (layer := layer_of(c.fqn)) is not None and low <= layer <= high}
    compiled = to_regex(pattern)
    return {c.fqn for c in candidates if compiled.fullmatch(c.fqn)}


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a pattern that is malformed."""
    if pattern.startswith("layers:"):
        layer_range(pattern)
    elif pattern.startswith("type:"):
        if not pattern.removeprefix("type:").isidentifier():
            raise ValueError(f"expected `type:` and the name of a class, got {pattern!r}")
    else:
        to_regex(pattern)


def layer_of(fqn: str) -> int | None:
    """Return the first number among the parts of a name: the index of its layer."""
    return next((int(part) for part in fqn.split(".") if part.isdigit()), None)


def layer_range(pattern: str) -> tuple[int, int]:
    """Return the bounds of `layers:[0-3]` or `layers:[2]`. Raises ValueError."""
    found = re.fullmatch(r"layers:\[(\d+)(?:-(\d+))?\]", pattern)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if low > high:
        raise ValueError(f"expected `layers:[first-last]`, got {pattern!r}")
    return low, high


def to_regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a name pattern. Raises ValueError for one that is malformed."""
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise ValueError(f"{pattern!r} has an unclosed or nested brace")
    return re.compile("".join(_piece(token) for token in re.findall(TOKEN, pattern)))


TOKEN = r"^\*\*\.|\.\*\*$|\.\*\*\.|\*\*|\*|\{[^{}]*\}|[^*{}.]+|."


def _piece(token: str) -> str:
    special = {"**.": r"(?:.*\.)?", ".**": r"(?:\..*)?", ".**.": r"\.(?:.*\.)?", "**": ".*", "*": r"[^.]*"}
    if token in special:
        return special[token]
    if token.startswith("{") and token.endswith("}"):
        words = [re.findall(r"\*\*|\*|[^*]+", word.strip()) for word in token[1:-1].split(",")]
        return "(?:" + "|".join("".join(map(_piece, word)) for word in words) + ")"
    return re.escape(token)
