"""YAML 1.2 scalars with the line of every value: `1e-6` is a number, `yes` is a word, a key given twice is an error."""

import re
from typing import Any

import yaml

from lrc.errors import SpecError

Path = tuple[str | int, ...]
LARGEST = 100_000


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


def parse(text: str, where: str) -> tuple[Any, dict[Path, int]]:
    """Return the data of a YAML (or JSON) text, and the line of every value by its path.

    Raises SpecError with file and line for what is no YAML, for a key given twice, and for aliases that contain themselves.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        got = f"the control character U+{int(error.character):04X}"
        raise SpecError(f"{where}:{line}", expected="YAML", got=got) from error
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        return (None if node is None else _build(loader, node, (), lines, where)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SpecError(f"{where}:{line}", expected="YAML", got=str(error.problem or error)) from error
    except yaml.YAMLError as error:
        raise SpecError(f"{where}:1", expected="YAML", got=str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise SpecError(f"{where}:1", message="the file is nested too deeply") from error
    finally:
        loader.dispose()


def parse_value(text: str) -> Any:
    """Return the value of a scalar or a flow collection, as an override gives it; what is no YAML is a word."""
    try:
        return parse(text, "override")[0]
    except SpecError:
        return text


def _build(loader: _Loader, node: yaml.Node, path: Path, lines: dict[Path, int], where: str) -> Any:
    if len(path) > 60:
        raise SpecError(f"{where}:{node.start_mark.line + 1}", message="the file is nested too deeply")
    if len(lines) > LARGEST:  # aliases of aliases: a small file may stand for any number of values
        raise SpecError(f"{where}:{node.start_mark.line + 1}", message=f"the file has more than {LARGEST} values")
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                got = key if isinstance(key, str) else "a collection"
                raise SpecError(f"{where}:{line}", expected="a word as key", got=got or "nothing")
            if key in data:
                raise SpecError(f"{where}:{line}", message=f"the key `{key}` is given twice", hint="Remove one")
            data[key] = _build(loader, value_node, (*path, key), lines, where)
            lines[(*path, key)] = line
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, part, (*path, i), lines, where) for i, part in enumerate(node.value)]
    try:
        return _scalar(loader, node)
    except (ValueError, KeyError) as error:  # a tag that its value does not fit
        tag = node.tag.rpartition(":")[2]
        raise SpecError(
            f"{where}:{node.start_mark.line + 1}", expected=f"a value of the type {tag}", got=node.value[:40]
        ) from error


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    if node.tag == "tag:yaml.org,2002:float":
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if node.tag == "tag:yaml.org,2002:int":
        return int(node.value)
    return loader.construct_object(node)
