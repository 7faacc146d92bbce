"""Reading data files: text, rows, arrays. Nothing in a file is ever run."""

import csv
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(str(path), message="no such file", hint="Paths in a spec start at the spec's own folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), message=f"the file cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(str(path), expected="some text", got="an empty file")
    return text


def read_rows(path: Path, columns: Sequence[str] = (), *, header: str | None = None) -> list[Row]:
    """Return the rows of a .jsonl or .csv file.

    A .csv whose first line names none of `columns` (nor `header`, nor one of the usual text columns) has no header: its
    columns are then called as `columns` says, in order, or `0`, `1`, …; a `header` that is a number is such a place. Raises
    DataError with the line of what is no row.
    """
    text = read_text(path)
    if path.suffix == ".jsonl":
        return list(_json_rows(text, path))
    (_, first), *lines = all_lines = _csv_lines(text, path)
    head = [cell.strip() for cell in first]
    known = {*columns, *TEXT_COLUMNS} | ({header} if header and not header.isdecimal() else set())
    if known & set(head):
        names = head
    else:
        names, lines = list(columns[: len(head)]) + [str(i) for i in range(len(columns), len(head))], all_lines
    if not lines:
        raise DataError(str(path), expected="rows under the header", got="none")
    for number, cells in lines:
        if len(cells) > len(names):
            hint = "Put quotes around a cell with a comma"
            raise DataError(f"{path}:{number}", expected=f"at most {len(names)} cells", got=str(len(cells)), hint=hint)
    return [dict(zip(names, cells, strict=False)) for _, cells in lines]


def _csv_lines(text: str, path: Path) -> list[tuple[int, list[str]]]:
    """Return the cells of every line that has some, with the line's number."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        return [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}", expected="comma-separated values", got=str(error)) from error


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
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
        got = f"the columns {', '.join(found)}"
        if found == [str(i) for i in range(len(found))]:
            got = f"the first line {','.join(map(str, rows[0].values()))}"
        raise DataError(str(path), expected=wanted, got=got, hint="Set `text_column`")
    return name


def texts_of(rows: Sequence[Row], path: Path, column: str | None) -> list[str]:
    """Return the text of every row; rows whose text is blank are left out. Raises DataError for a row without text."""
    name = text_column(rows, path, column)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(name), str | int | float):
            raise DataError(f"{path}, row {number}", expected=f"text in the column `{name}`", got=repr(row.get(name)))
    texts = [str(row[name]) for row in rows if str(row[name]).strip()]
    if not texts:
        raise DataError(str(path), expected=f"text in the column `{name}`", got="none")
    return texts


def ids_of(rows: Sequence[Row], path: Path, column: str) -> list[list[int]]:
    """Return the token ids of every row. Raises DataError for a row without any."""
    for number, row in enumerate(rows, 1):
        ids = row.get(column)
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{path}, row {number}", expected=f"a list of token ids in `{column}`", got=repr(ids)[:60])
    return [row[column] for row in rows]


def need_columns(rows: Sequence[Row], path: Path, columns: Sequence[str]) -> None:
    """Raise DataError unless every row has all of `columns`."""
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if row.get(column) in (None, "")]
        if missing:
            empty = [column for column in missing if column in row]
            got = f"nothing in {', '.join(empty)}" if empty else ", ".join(map(str, row)) or "none"
            raise DataError(f"{path}, row {number}", expected=f"the columns {', '.join(columns)}", got=got)


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npz or .safetensors file. Raises DataError for damage, and for sizes that do not agree."""
    if not path.is_file():
        raise DataError(str(path), message="no such file", hint="Paths in a spec start at the spec's own folder")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        else:
            with safe_open(path, framework="pt") as opened:
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, TypeError, EOFError, SafetensorError, BadZipFile, zlib.error) as error:
        raise DataError(str(path), message=f"the file is damaged or holds no arrays: {error}") from error
    sizes = {a.shape[0] if a.ndim else 0 for a in arrays.values()}
    if len(sizes) != 1 or min(sizes) < 1:
        raise DataError(str(path), expected="arrays with the same number of samples", got=f"sizes {sorted(sizes)}")
    return arrays
