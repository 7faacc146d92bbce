"""Reading data files: text, rows, arrays. Nothing in a file is ever run."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrc.errors import DataError

TEXT_COLUMNS = ("text", "sentence", "content", "prompt", "question")
Row = dict[str, Any]


def read_text(path: Path) -> str:
    """Return a text file. Raises DataError when it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(str(path), message="no such file", hint="Paths in a spec start at the spec's own folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), message=f"the file cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(str(path), expected="some text", got="an empty file")
    return text


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a .jsonl or .csv file.

    A .csv whose first line names none of `columns` (or of the usual text columns) has no header: its columns are then
    called as `columns` says, in order, or `0`, `1`, …. Raises DataError with the line of what is no row.
    """
    text = read_text(path)
    if path.suffix == ".jsonl":
        return list(_json_rows(text, path))
    lines = [line for line in csv.reader(text.splitlines()) if line]
    head = [cell.strip() for cell in lines[0]]
    known = set(columns) | set(TEXT_COLUMNS)
    if known & set(head):
        names, lines = head, lines[1:]
    else:
        names = list(columns[: len(head)]) + [str(i) for i in range(len(columns), len(head))]
    if not lines:
        raise DataError(str(path), expected="rows under the header", got="none")
    return [dict(zip(names, line, strict=False)) for line in lines]


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}", expected="one JSON object a line", got=str(error)) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}", expected="one JSON object a line", got=type(row).__name__)
        yield row


def text_column(rows: Sequence[Row], path: Path, column: str | None) -> str:
    """Return the column that holds the text. Raises DataError that lists the columns there are."""
    found = list(rows[0])
    name = column or next((c for c in TEXT_COLUMNS if c in found), None)
    if name is None or name not in found:
        wanted = f"a column `{column}`" if column else f"a column named {' or '.join(TEXT_COLUMNS)}"
        raise DataError(str(path), expected=wanted, got=f"the columns {', '.join(found)}", hint="Set `text_column`")
    return name


def need_columns(rows: Sequence[Row], path: Path, columns: Sequence[str]) -> None:
    """Raise DataError unless every row has all of `columns`."""
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if row.get(column) in (None, "")]
        if missing:
            raise DataError(
                f"{path}, row {number}",
                expected=f"the columns {', '.join(columns)}",
                got=", ".join(map(str, row)) or "none",
            )


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npz or .safetensors file. Raises DataError for damage, and for sizes that do not agree."""
    if not path.is_file():
        raise DataError(str(path), message="no such file", hint="Paths in a spec start at the spec's own folder")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        else:
            with safe_open(path, framework="pt") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, SafetensorError, TypeError) as error:
        raise DataError(str(path), message=f"the file is damaged or holds no arrays: {error}") from error
    sizes = {a.shape[0] if a.ndim else 0 for a in arrays.values()}
    if len(sizes) != 1 or min(sizes) < 1:
        raise DataError(str(path), expected="arrays with the same number of samples", got=f"sizes {sorted(sizes)}")
    return arrays
