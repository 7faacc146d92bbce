"""A Hugging Face folder before anything in it is loaded: it is whole, it stays inside itself, it runs no code."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from lrc.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json`. Raises ModelError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(str(folder), message="no such folder", hint="Name a Hugging Face folder, or download one first")
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            str(folder), expected="a Hugging Face folder with `config.json`", got=found, hint="Name the folder itself"
        )
    return _read_json(path)


def check_weights(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. Raises ModelError for one that is missing, damaged or outside of it."""
    index = folder / INDEX
    files = _indexed(index) if index.is_file() else [folder / SINGLE]
    if not index.is_file() and not files[0].is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        got = f"{pickles[0]}, a pickle that could run code" if pickles else "no weights"
        hint = "Convert it: load it once with transformers and call `save_pretrained`" if pickles else "Copy it there"
        raise ModelError(str(folder), expected=SINGLE, got=got, hint=hint)
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(path: Path) -> list[str]:
    """Return the names of the tensors in a file. Raises ModelError when it is missing or damaged."""
    if not path.is_file():
        raise ModelError(str(path), message="the file is missing", hint="Copy the whole folder again")
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            str(path),
            message=f"the file is damaged or cut short ({path.stat().st_size} bytes: {error})",
            hint="Copy or download it again",
        ) from error


def _indexed(index: Path) -> list[Path]:
    """Return the shards that an index names; a name that leads out of the folder is refused."""
    weights: Mapping[str, str] = _read_json(index).get("weight_map", {})
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights.values()):
        raise ModelError(str(index), expected="a `weight_map` of tensor names to file names", got=type(weights).__name__)
    for name in sorted(set(weights.values())):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ModelError(str(index), message=f"the index points outside the folder: {name!r}", hint="Do not use it")
    found = {name: set(check_safetensors(index.parent / name)) for name in sorted(set(weights.values()))}
    for tensor, name in weights.items():
        if tensor not in found[name]:
            raise ModelError(str(index), message=f"{name} lacks the tensor {tensor!r} that the index promises")
    return [index.parent / name for name in found]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(str(path), expected="JSON", got=str(error), hint="Copy the file again") from error
    if not isinstance(data, dict):
        raise ModelError(str(path), expected="a JSON object", got=type(data).__name__)
    return data
