"""`lrc export`: another format from a finished folder, without compiling again."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrc.errors import UsageError
from lrc.program.capture import load_exported
from lrc.program.huggingface import capture_folder
from lrc.program.program import Program
from lrc.spec.load import load_document
from lrc.spec.registry import EXPORTERS
from lrc.verify.decoding import cases_of
from lrc.verify.evaluate import raise_on_missed
from lrc.verify.parity import Artifact, check
from lrc.verify.tolerance import Numerics


def export_folder(folder: Path, kind: str, output: Path | None = None, settings: Sequence[str] = ()) -> list[Path]:
    """Lower a finished folder to the format `kind`, check the artifact in a fresh process, and put it into `output`.

    Without `output` it goes into the folder. settings: options of the format, `key=value`. Returns the files. Raises
    UsageError for an unknown format, a file that is in the way, or a folder that is none of ours; SpecError for settings that
    the format does not have; GateError when the artifact differs; it is put there all the same.
    """
    try:
        rule = EXPORTERS.get(kind)
    except ValueError as error:
        raise UsageError("--format", message=str(error)) from error
    document, _ = load_document({"version": 1, "export": [{"format": kind}]}, [f"export.0.{word}" for word in settings])
    options: Any = document.export[0]
    program = program_of(folder)
    target = output or folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as name:
        scratch = Path(name)
        written = rule(program, scratch, options)
        made = sorted(p for p in scratch.rglob("*") if p.is_file())
        taken = [p for p in made if (target / p.relative_to(scratch)).exists()]
        if taken:
            raise UsageError(
                str(target / taken[0].relative_to(scratch)),
                message="the file exists",
                hint="Choose another folder with `-o`",
            )
        cases = cases_of(program, cached=written.cached)
        artifact = Artifact(kind, scratch / written.artifact, options.opens, written.rounding)
        rows = check([(artifact, cases)], Numerics.of_program(program))
        files = []
        for path in made:
            place = target / path.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
            files.append(place)
    raise_on_missed([row.row() for row in rows], str(target))
    return files


def program_of(folder: Path) -> Program:
    """Return the program of a finished folder. Raises UsageError when it holds none."""
    if (folder / "config.json").is_file():
        task = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("lrc") or {}).get("task")
        return capture_folder(folder, task=task)
    if (folder / "program.pt2").is_file():
        return load_exported(folder / "program.pt2")
    raise UsageError(str(folder), expected="a finished output folder of lrc", got="neither config.json nor program.pt2")
