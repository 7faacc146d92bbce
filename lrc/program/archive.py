"""A `.pt2` archive before torch opens it: it must be data alone.

torch.export.load would run code from four places: objects pickled among weights, constants and example inputs; native
code beside the program; expressions of sizes, which sympy evaluates; names, which become part of generated Python.
"""

import ast
import builtins
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lrc.errors import CaptureError

CODE_PREFIXES = ("opaque_obj", "custom_obj")
NAMES = {"name", "as_name", "fqn", "parameter_name", "buffer_name", "tensor_constant_name", "forward_arg_names"}
NAME = re.compile(r"[\w.]*")
EXPRESSION = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Tuple,
)  # fmt: skip


def check_archive(path: Path) -> None:
    """Raise CaptureError for a file that is missing, damaged, or holds what torch would run code to load."""
    if not path.is_file():
        raise CaptureError(str(path), message="no such file", hint="Name a program saved by torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            code = next(_code(archive), None)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, RecursionError) as error:
        raise CaptureError(
            str(path),
            expected="a program saved by torch.export.save",
            got=f"a damaged or other file ({error})",
            hint="Save it again",
        ) from error
    if code is not None:
        raise CaptureError(
            str(path),
            message=f"the file holds {code}, which could run code",
            hint="Save the program again with plain tensors as weights, constants and example inputs",
        )


def _code(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield what is not data, in words. torch finds members whatever the case of their names, so we look at lower case."""
    names = archive.namelist()
    lower = [name.lower() for name in names]
    for name, low in zip(names, lower, strict=True):
        if lower.count(low) > 1:
            yield f"two members of the name {name!r}"
        elif "/aotinductor/" in f"/{low}":
            yield f"native code ({name})"
        elif low.endswith(("serialized_exported_program.json", "serialized_state_dict.json", "serialized_constants.json")):
            yield f"a program in a format of old ({name})"
        elif Path(low).name.startswith(CODE_PREFIXES) or (low.endswith(".pt") and not _is_plain(archive.read(name))):
            yield f"pickled objects ({name})"
        elif low.endswith(".json"):
            yield from _code_in(json.loads(archive.read(name)))


def _is_plain(data: bytes) -> bool:
    """Say whether a pickle holds tensors and plain containers alone."""
    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return False
    return True


def _code_in(value: Any, key: str = "") -> Iterator[str]:
    """Walk a JSON file of the archive."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield f"pickled objects ({value.get('path_name')})"
        for name, part in value.items():
            yield from _code_in(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _code_in(part, key)
    elif isinstance(value, str) and key == "expr_str" and not _is_expression(value):
        yield f"an expression that is none of a size ({value[:60]!r})"
    elif isinstance(value, str) and key in NAMES and not NAME.fullmatch(value):
        yield f"a name that is none ({value[:60]!r})"
    elif isinstance(value, str) and key in {"in_spec", "out_spec"}:
        yield from _code_in_tree(json.loads(value))


def _code_in_tree(value: Any) -> Iterator[str]:
    """Walk the tree of a program's inputs or outputs: the keys of its mappings are names."""
    if isinstance(value, dict):
        keys = json.loads(value["context"]) if isinstance(value.get("context"), str) else None
        for key in keys if isinstance(keys, list) else ():
            if isinstance(key, str) and not NAME.fullmatch(key):
                yield f"a name that is none ({key[:60]!r})"
        value = value.get("children_spec")
    for part in value if isinstance(value, list) else ():
        yield from _code_in_tree(part)


def _is_expression(text: str) -> bool:
    """Say whether a text is arithmetic on symbols: calls of sympy's classes, with numbers and plain words as arguments."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return False
    return all(
        isinstance(node, EXPRESSION)
        and (not isinstance(node, ast.Call) or _is_class(node.func))
        and (not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.value.isidentifier())
        for node in nodes
    )


def _is_class(function: ast.expr) -> bool:
    return isinstance(function, ast.Name) and function.id[:1].isupper() and not hasattr(builtins, function.id)
