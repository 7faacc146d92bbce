"""What is different between two specs, two plans, or two output folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lrc.errors import UsageError
from lrc.run.plan import Plan

Difference = dict[str, Any]


def diff(a: Path, b: Path) -> list[Difference]:
    """Return the differences as rows with `where`, `a` and `b`; none when both say the same.

    Output folders and plans are compared by decision, specs by key. Raises UsageError when the two are of two kinds.
    """
    kinds = {_kind(a), _kind(b)}
    if len(kinds) > 1:
        raise UsageError(f"{a}, {b}", expected="two specs, two plans or two output folders", got=" and ".join(sorted(kinds)))
    if kinds == {"spec"}:
        return _differences(_flat(_read(a)), _flat(_read(b)))
    return _differences(_decisions(Plan.load(a)), _decisions(Plan.load(b)))


def _kind(path: Path) -> str:
    if not path.exists():
        raise UsageError(str(path), expected="a spec, a plan.json or an output folder", got="no such file")
    if path.is_dir():
        return "output folder"
    data = _read(path)
    return "plan" if "decisions" in data else "spec"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(str(path), expected="YAML or JSON", got=str(error)) from error
    if not isinstance(data, Mapping):
        raise UsageError(str(path), expected="a mapping", got=type(data).__name__)
    return data


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    items: Any = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    if not isinstance(data, (Mapping, list)):
        return {at: data}
    return {k: v for key, value in items for k, v in _flat(value, f"{at}.{key}" if at else str(key)).items()}


def _decisions(plan: Plan) -> dict[str, Any]:
    rows: dict[str, Any] = {"parameters": plan.parameters[1], "bytes": plan.bytes[1]}
    for d in plan.decisions:
        rows[f"{d.type} @ {d.name}"] = f"kept: {d.keep}" if d.keep else d.after.text
    return rows


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    keys = list(a) + [key for key in b if key not in a]
    return [{"where": k, "a": a.get(k, "–"), "b": b.get(k, "–")} for k in keys if a.get(k, "–") != b.get(k, "–")]
