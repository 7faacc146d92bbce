"""Opening what a run left, whatever its format: a folder, an ONNX file, a package, a program."""

import json
import zipfile
from pathlib import Path
from typing import Any

from lrc.data import Request
from lrc.errors import UsageError
from lrc.lower.base import Runner
from lrc.lower.hf_folder import ModelRunner
from lrc.lower.load import load
from lrc.lower.pt2 import Pt2Runner, is_package
from lrc.program.program import Program
from lrc.program.source import Source, load_program
from lrc.program.tasks import token_inputs
from lrc.spec.document import Document
from lrc.verify.evaluate import Gate, Score, evaluate, judge

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


def open_artifact(name: str, *, allow_code: bool = False) -> Runner:
    """Return a runner for an output folder, a model, or a .onnx or .pt2 file. Raises UsageError, ModelError or LowerError."""
    path = Path(name)
    if path.suffix == ".onnx":
        from lrc.lower.ort_decoder import open_onnx

        return open_onnx(path)
    if path.suffix == ".pt2" and path.is_file() and zipfile.is_zipfile(path):
        if not is_package(path):
            return Pt2Runner(path)
        if not allow_code:
            raise UsageError(
                name,
                message="an AOTInductor package is native code",
                hint="Add `--allow-code` if you made it or trust its maker",
            )
        from lrc.lower.aoti import AotiRunner

        return AotiRunner(path)
    if path.is_dir():
        return ModelRunner(load(path))
    return load_program(Source(name), allow_code=allow_code)


def request_for_artifact(name: str, document: Document, base: Path, *, allow_code: bool) -> Request:
    """Return how the spec's evaluation data is read for an artifact: with the tokenizer and task of its folder."""
    folder = home_of(Path(name)) or (Path(document.model.path) if document.model.path else None)
    if document.model.path and (folder is None or not folder.is_dir()):
        from lrc.program.source import resolve_folder

        folder = resolve_folder(Source(document.model.path))
    config = _json(folder / "config.json") if folder else {}
    manifest = _json(folder / "lrc" / "manifest.json") if folder else {}
    task = document.model.task or (config.get("lrc") or {}).get("task") or manifest.get("task")
    inputs = token_inputs(folder, None) if folder else ["input_ids", "attention_mask"]
    spec = document.evaluate
    return Request(
        dataset=spec.dataset or "", inputs=inputs, task=task, tokenizer=folder, base=base, samples=spec.samples,
        max_length=spec.max_length, batch_size=spec.batch_size, draw=False, text_column=spec.text_column, allow_code=allow_code,
    )  # fmt: skip


def home_of(path: Path) -> Path | None:
    """Return the folder with a tokenizer that an artifact is in, or None."""
    for folder in (path, *path.absolute().parents[:3]):
        if folder.is_dir() and any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return None


def evaluate_artifact(
    name: str, document: Document, base: Path, original: Program | None, *, allow_code: bool = False
) -> tuple[list[Score], list[Gate]]:
    """Measure the spec's metrics on an artifact, beside the original model if one is given, and judge the gates."""
    if not document.evaluate.metrics:
        raise UsageError("evaluate.metrics", message="the spec names no metric", hint="Add `evaluate: {metrics: [...]}`")
    runner = open_artifact(name, allow_code=allow_code)
    request = request_for_artifact(name, document, base, allow_code=allow_code)
    scores = evaluate(runner, original, document.evaluate, request)
    return scores, judge(scores, document.evaluate.gates)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
