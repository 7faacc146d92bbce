"""From a spec file, presets, imports and overrides to a `Document`; every error has its file and line."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lrc.errors import SpecError
from lrc.spec.document import Document
from lrc.spec.yaml12 import Path as Place
from lrc.spec.yaml12 import parse, parse_value

PRESETS = "lrc_specs"
Places = dict[Place, str]


def load_document(spec: "str | Path | Mapping[str, Any]", overrides: Sequence[str] = ()) -> tuple[Document, Path | None]:
    """Read a spec: a file, `preset:NAME`, or the same as a mapping. Returns the document and its file.

    overrides: `section.key=value`, applied last. Raises SpecError.
    """
    file: Path | None = None
    if isinstance(spec, Mapping):
        data, places = _resolve(copy.deepcopy(dict(spec)), {}, Path.cwd(), "spec")
    elif str(spec).startswith("preset:"):
        data, places = preset(str(spec).removeprefix("preset:"))
    else:
        file = Path(spec)
        data, places = _read(file)
    for override in overrides:
        apply_override(data, override, places)
    return validated(data, places, file.name if file else "spec"), file


def validated(data: Mapping[str, Any], places: Mapping[Place, str], where: str) -> Document:
    """Return the document. Raises SpecError that lists every mistake with its place."""
    if isinstance(data.get("version"), bool):  # equal to 1 in Python, not in a file
        raise SpecError(places.get(("version",), where), message=f"version: expected 1, got {str(data['version']).lower()}")
    if data.get("version") is None:
        raise SpecError(places.get((), where), message="the key `version` is missing", hint="Start the file with `version: 1`")
    try:
        return Document.model_validate(dict(data))
    except ValidationError as error:
        first, *others = [_message(detail, data, places, where) for detail in error.errors()]
        more = "".join(f"\n{place}: {text}" for place, text in others)
        raise SpecError(first[0], message=first[1] + more) from error


def _message(detail: Any, data: Any, places: Mapping[Place, str], where: str) -> tuple[str, str]:
    """Return the place and the text of one pydantic error."""
    path = _known_part(data, detail["loc"])
    place = next((places[path[:i]] for i in range(len(path), -1, -1) if path[:i] in places), where)
    text = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("missing",):
        text = f"the key `{detail['loc'][-1]}` is missing"
    elif detail["type"] not in ("unknown_key", "value_error", "registered_type", "rank_type"):
        text = f"{text[0].lower()}{text[1:]}, got {detail['input']!r}"
    dotted = ".".join(map(str, path))
    return place, f"{dotted}: {text}" if dotted else text


def _known_part(data: Any, loc: Sequence[str | int]) -> Place:
    """Return the part of a pydantic location that is a path in the data; union tags and the like are left out."""
    path: list[str | int] = []
    for key in loc:
        inside = isinstance(data, Mapping) and key in data
        if inside or (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            here: Any = data
            data = here[key]
            path.append(key)
    return tuple(path)


def _read(file: Path, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], Places]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(str(file), message="no such file", hint="`lrc init MODEL` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(file), message=f"the file cannot be read: {error}") from error
    return _parsed(text, str(file), file.parent, (*above, str(file.resolve())))


def _parsed(text: str, where: str, folder: Path, above: tuple[str, ...]) -> tuple[dict[str, Any], Places]:
    data, lines = parse(text, where)
    if not isinstance(data, dict):
        got = "an empty file" if data is None else type(data).__name__
        raise SpecError(f"{where}:1", expected="a mapping of keys", got=got, hint="Start the file with `version: 1`")
    places = {path: f"{where}:{line}" for path, line in lines.items()}
    return _resolve(data, places, folder, where, above)


def _resolve(
    data: dict[str, Any], places: Places, folder: Path, where: str, above: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Places]:
    """Put what `imports` and `preset` name under the data; what the data says itself wins, key by key.

    above: the files and presets that are being read, so that none builds on itself.
    """
    base: dict[str, Any] = {}
    base_places: Places = {(): places.get((), where)}
    for name, place in _words(data.pop("imports", []), "imports", places, where):
        file = folder / name
        if str(file.resolve()) in above:
            raise SpecError(place, message=f"`{name}` imports itself, directly or through another file")
        if not file.is_file():
            raise SpecError(place, message=f"there is no file {file}", hint="`imports` start at the spec's own folder")
        _merge(base, base_places, *_read(file, above))
    for name, place in _words(data.pop("preset", []), "preset", places, where):
        _merge(base, base_places, *preset(name, place, above))
    if not base:
        return data, places
    _merge(base, base_places, data, places)
    return base, base_places


def _words(value: Any, key: str, places: Places, where: str) -> list[tuple[str, str]]:
    """Return the names under a key, each with its place."""
    names = [value] if isinstance(value, str) else value
    own = places.get((key,), where)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(own, expected=f"a name or a list of names as `{key}`", got=repr(value))
    return [(name, places.get((key, i), own)) for i, name in enumerate(names)]


def _merge(base: dict[str, Any], base_places: Places, data: Mapping[str, Any], places: Places, at: Place = ()) -> None:
    for key, value in data.items():
        path = (*at, key)
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            _merge(old, base_places, value, places, path)
            continue
        for stale in [p for p in base_places if p[: len(path)] == path]:
            del base_places[stale]
        base[key] = value
        base_places |= {p: place for p, place in places.items() if p[: len(path)] == path}


def preset(name: str, place: str = "", above: tuple[str, ...] = ()) -> tuple[dict[str, Any], Places]:
    """Return a ready spec by name. place: where it is named. Raises SpecError that lists the known ones."""
    known, own = preset_names(), f"preset:{name}"
    if own in above:
        raise SpecError(place, message=f"the preset {name!r} builds on itself")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}"
        raise SpecError(place or own, message=f"there is no preset {name!r}", hint=hint)
    file = resources.files(PRESETS) / f"{name}.yaml"
    return _parsed(file.read_text(encoding="utf-8"), own, Path.cwd(), (*above, own))


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    try:
        files = list(resources.files(PRESETS).iterdir())
    except ModuleNotFoundError:
        return []
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def apply_override(data: dict[str, Any], override: str, places: Places) -> None:
    """Set `section.key=value` in the data. Raises SpecError for a path that leads nowhere."""
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise SpecError(f"override {override!r}", expected="section.key=value", got=override or "nothing")
    here: Any = data
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                at = ".".join(keys[:i])
                raise SpecError(f"override {override!r}", expected=f"an index below {len(here)} in `{at}`", got=key)
            slot: Any = int(key)
        elif isinstance(here, dict):
            slot = key
            if not last and not isinstance(here.get(key), dict | list):
                if keys[i + 1].isdecimal():
                    raise SpecError(f"override {override!r}", message=f"`{'.'.join(keys[: i + 1])}` is no list")
                here[key] = {}
                _set_place(places, keys[: i + 1], override)
        else:
            raise SpecError(f"override {override!r}", message=f"`{'.'.join(keys[:i])}` has no keys")
        if last:
            here[slot] = parse_value(value)
        else:
            here = here[slot]
    _set_place(places, keys, override)


def _set_place(places: Places, keys: Sequence[str], override: str) -> None:
    """Say that everything from a path on comes from an override."""
    prefix = tuple(int(key) if key.isdecimal() else key for key in keys)
    for stale in [place for place in places if place[: len(prefix)] == prefix]:
        del places[stale]
    places[prefix] = f"override {override!r}"


def to_yaml(document: Document) -> str:
    """Return a document as YAML, every default written out."""
    return str(yaml.safe_dump(document.resolved(), sort_keys=False, allow_unicode=True, width=120))
