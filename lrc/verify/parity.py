"""Every artifact, reopened in a fresh process and compared with the program in memory."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrc.errors import LowerError
from lrc.verify.cases import Case, save_cases
from lrc.verify.tolerance import Numerics

TIMEOUT = 1800  # seconds; a compiled artifact may compile again when it is opened


@dataclass(frozen=True)
class Artifact:
    """What is checked: its format, its path, `module:callable` that opens it, and how it rounds (see `Written`)."""

    format: str
    path: Path
    opens: str
    rounding: float = 0.0


@dataclass(frozen=True)
class Parity:
    """One output of one artifact at one shape: the errors against the program in memory, and what was allowed."""

    format: str
    shape: str
    output: str
    largest: float
    mean: float
    allowed: float
    allowed_mean: float
    ok: bool

    def row(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def check(artifacts: Sequence[tuple[Artifact, Sequence[Case]]], numerics: Numerics) -> list[Parity]:
    """Compare every artifact with what its cases expect; each runs in a process of its own, all at the same time.

    Raises LowerError when an artifact does not open or run; a difference beyond the tolerance is no error but `ok: False`.
    """
    with tempfile.TemporaryDirectory(prefix="lrc-verify-") as name:
        running: list[tuple[Artifact, Sequence[Case], tuple[subprocess.Popen[str], Path]]] = []
        rows = []
        try:
            for i, (artifact, cases) in enumerate(artifacts):
                running.append((artifact, cases, _start(artifact, cases, Path(name) / str(i))))
            for artifact, cases, (process, folder) in running:
                outputs = _finish(artifact, process, folder, len(cases))
                rows += [
                    row
                    for case, found in zip(cases, outputs, strict=True)
                    for row in compare(artifact.format, case, found, replace(numerics, rounding=artifact.rounding))
                ]
        finally:
            for _, _, (process, _) in running:
                process.kill()
                process.wait()
                if process.stderr is not None:
                    process.stderr.close()
    return rows


def compare(kind: str, case: Case, found: Mapping[str, Tensor], numerics: Numerics) -> list[Parity]:
    """Return a row for every expected output. Raises LowerError for one that is missing or has another shape."""
    rows = []
    for name, expected in case.expected.items():
        if name not in found or found[name].shape != expected.shape:
            got = f"shape {tuple(found[name].shape)}" if name in found else f"outputs {', '.join(found)}"
            raise LowerError(f"{kind}: {name}", expected=f"an output of shape {tuple(expected.shape)}", got=got)
        tolerance = numerics.tolerance(expected)
        difference = error_of(found[name], expected)
        largest, mean = (float(difference.max()), float(difference.mean())) if difference.numel() else (0.0, 0.0)
        ok = largest <= tolerance.largest and mean <= tolerance.mean
        rows.append(Parity(kind, case.shape, name, largest, mean, tolerance.largest, tolerance.mean, ok))
    return rows


def error_of(found: Tensor, expected: Tensor) -> Tensor:
    """Return absolute differences; equal infinities differ by 0, any other NaN or infinity by infinity."""
    difference = (found.double() - expected.double()).abs()
    difference = torch.where(found.double() == expected.double(), torch.zeros_like(difference), difference)
    return torch.where(torch.isnan(difference), torch.full_like(difference, torch.inf), difference)


def _start(artifact: Artifact, cases: Sequence[Case], folder: Path) -> "tuple[subprocess.Popen[str], Path]":
    folder.mkdir()
    save_file(save_cases(cases), folder / "inputs.safetensors")
    job = {"opens": artifact.opens, "path": str(artifact.path.absolute()), "cases": len(cases)}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "lrc.verify.worker", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), folder


def _finish(artifact: Artifact, process: "subprocess.Popen[str]", folder: Path, count: int) -> list[dict[str, Tensor]]:
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise LowerError(artifact.format, message=f"the artifact gave no answer in {TIMEOUT} s") from error
    if process.returncode != 0:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}")
        raise LowerError(
            f"{artifact.format}: {artifact.path.name}", message=f"the artifact does not run in a fresh process: {last}"
        )
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    with safe_open(folder / "outputs.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            case, _, name = key.partition("/")
            found[int(case)][name] = file.get_tensor(key)
    return found
