"""The Python face: capture, plan, compile, load, register_pass. The commands of the terminal call these too."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lrc.errors import LrcError
from lrc.lower.aoti import AotiExport, export_aoti
from lrc.lower.load import load as load_folder
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.program import Program
from lrc.program.graft import graft
from lrc.report.card import model_card
from lrc.report.html import html_report
from lrc.report.tables import plain_report
from lrc.run.job import Job, Record, compile_to, request_for
from lrc.run.output import OutputFolder
from lrc.run.pipeline import make_plan, run_passes
from lrc.run.plan import Plan
from lrc.run.prepare import Model, Prepared, Spec, prepare
from lrc.run.prepare import capture as capture_any
from lrc.run.session import Progress, silent
from lrc.run.switching import Adapters, adapters_of, load_adapters
from lrc.spec.load import to_yaml
from lrc.spec.registry import PASSES, Rule
from lrc.train.distributed import world
from lrc.verify.evaluate import raise_on_missed


@dataclass(frozen=True)
class Compiled:
    """A compiled model in memory, and every way out of it.

    dense: the program as it was before; where a program was given, that one.
    """

    prepared: Prepared
    plan: Plan
    dense: Program

    @property
    def program(self) -> Program:
        """The rewritten graph and its sites."""
        return self.prepared.program

    @property
    def module(self) -> nn.Module:
        """A module that is called and answers as the captured one did."""
        return self.program.module()

    @cached_property
    def adapters(self) -> Adapters:
        """The program's adapters by name: load further ones, switch between them, merge one; see `Adapters`."""
        return Adapters(self.program)

    @property
    def training(self) -> list[dict[str, Any]]:
        """What every pass `train` did, with its losses step by step."""
        return self.prepared.session.training

    @property
    def report(self) -> str:
        """The plan as it was carried out, as text."""
        return plain_report(self.plan)

    def graft(self, model: nn.Module | None = None) -> nn.Module:
        """Return a tree like the user's module with the same maps inside; see `lrc.program.graft`."""
        return graft(self.program, model)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the spec's exports (or the form that `lrc.load` reads) into a folder, checked. Returns its path.

        Raises LrcError when a check fails; the folder is there all the same.
        """
        done = write(self.prepared, Path(folder), overwrite=overwrite, made=self)
        done.raise_on_failure()
        return done.path

    def to_onnx(self, path: str | Path, *, cache: bool | None = None) -> Path:
        """Write one ONNX file. cache: with the key-value cache, by default where the model generates text."""
        return self._one(export_onnx, OnnxExport(cache=cache), Path(path))

    def to_aoti(self, path: str | Path) -> Path:
        """Write one AOTInductor package."""
        return self._one(export_aoti, AotiExport(), Path(path))

    def _one(self, export: Any, options: Any, path: Path) -> Path:
        """Export into a folder beside `path`, then move the file there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
            made = Path(name) / export(self.program, Path(name), options).artifact
            for file in sorted(made.parent.iterdir()):
                if file != made:
                    file.replace(path.parent / file.name)
            made.replace(path)
        return path


@dataclass(frozen=True)
class Finished:
    """A finished output folder and what there is to tell of it."""

    path: Path
    record: Record

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data."""
        record = self.record
        return {
            "output": str(self.path),
            "artifacts": {name: str(self.path / made["artifact"]) for name, made in record.artifacts.items()},
            "notes": {name: made["notes"] for name, made in record.artifacts.items() if made["notes"]},
            "parameters": list(record.plan.parameters),
            "bytes": list(record.plan.bytes),
            "parity": record.parity,
            "metrics": record.metrics,
            "gates": record.gates,
            "failures": record.failures,
            "seconds": record.seconds,
        }

    def raise_on_failure(self) -> None:
        """Raise LrcError for a check that could not be made, GateError for one that was missed."""
        if self.record.failures:
            raise LrcError(
                str(self.path), message=f"the result was written, but a check failed: {'; '.join(self.record.failures)}"
            )
        raise_on_missed([*self.record.parity, *self.record.gates], str(self.path))


def capture(model: Model, inputs: Any = None, *, allow_code: bool = False) -> Program:
    """Capture a module, exported program, graph module, or anything that MODEL may name, as a `Program`.

    inputs: example tensors of a module, by name or position. Raises CaptureError with the line that torch.export refused.
    """
    return capture_any(model, inputs=inputs, allow_code=allow_code)


def plan(model: Model | None, spec: Spec, **options: Any) -> Plan:
    """Return what `compile` would do; nothing is changed. Options as for `compile`."""
    prepared = prepare(model, spec, **options)
    return make_plan(prepared.program, prepared.document.passes, prepared.session)


def compile(
    model: Model | None,
    spec: Spec,
    *,
    inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    allow_code: bool = False,
    progress: Progress = silent,
) -> Compiled:
    """Compile a model in memory as a spec says; the model itself is not changed.

    model: a module, exported program, graph module, `Program`, or what MODEL may name. spec: a file, `preset:NAME`, or the
    same as a mapping. inputs: example tensors of a module. calibration: batches, in place of the spec's data.
    Raises LrcError with the place and the remedy.
    """
    prepared = prepare(
        model,
        spec,
        overrides=overrides,
        inputs=inputs,
        calibration=calibration,
        cache=cache,
        allow_code=allow_code,
        progress=progress,
    )
    dense = model if isinstance(model, Program) else prepared.program.clone()  # of a program, `prepare` has made a copy
    made = run_passes(prepared.program, prepared.document.passes, prepared.session, dense)
    return Compiled(prepared, made, dense)


def compile_to_folder(
    model: Model | None,
    spec: Spec,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    allow_code: bool = False,
    progress: Progress = silent,
) -> Finished:
    """Do the whole job of `lrc compile`: read, capture, rewrite, lower, verify, evaluate, publish.

    Raises LrcError before anything is written, or when the work itself fails; for checks see `Finished.raise_on_failure`.
    """
    from lrc.run.prepare import read_spec

    document, _ = read_spec(spec, overrides)
    path = Path(output or document.output)
    if world().first:
        OutputFolder(path, "", overwrite=overwrite).check()
    prepared = prepare(model, spec, overrides=overrides, output=path, cache=cache, allow_code=allow_code, progress=progress)
    return write(prepared, path, overwrite=overwrite, resume=resume, allow_code=allow_code)


def write(
    prepared: Prepared,
    path: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    allow_code: bool = False,
    made: Compiled | None = None,
) -> Finished:
    """Run a prepared job into a folder. made: what is compiled already; its passes are not run again."""
    text = prepared.file.read_text(encoding="utf-8") if prepared.file else to_yaml(prepared.document)
    job = Job(
        program=prepared.program,
        document=prepared.document,
        session=prepared.session,
        request=request_for(prepared.program, prepared.document, prepared.base, allow_code=allow_code),
        spec_text=text,
        finish=about,
        plan=None if made is None else made.plan,
        original=None if made is None else made.dense,
    )
    record, published = compile_to(path, job, overwrite=overwrite, resume=resume)
    return Finished(published, record)


def about(record: Record, spec: str) -> Mapping[str, str]:
    """Return the files that a person reads: the report and the model card."""
    manifest = {"model": record.model, "parity": record.parity, "failures": record.failures, "training": record.training}
    metrics = {"metrics": record.metrics, "gates": record.gates}
    return {
        "lrc/report.html": html_report(record.plan, manifest, metrics, spec),
        "README.md": model_card(record.plan, record.model, record.metrics, list(record.artifacts), spec),
    }


def load(folder: str | Path, *, adapters: Mapping[str, str | Path] | None = None, allow_code: bool = False) -> nn.Module:
    """Reload an output folder: the transformers model, or the module of `program.pt2`. Raises ModelError.

    adapters: PEFT folders by names, all on the folder's model, which is captured for that; the first one is active, and
    `lrc.set_adapter(module, name)` switches. Raises UsageError for adapters of another model.
    """
    if not adapters:
        return load_folder(Path(folder))
    program = capture_any(str(folder), allow_code=allow_code)
    made = load_adapters(program, adapters)
    return made.module() if program.origin.model is None else made.graft()


def set_adapter(module: nn.Module, name: str | None) -> None:
    """Make an adapter of a module active, of `lrc.load(…, adapters=…)` or `compiled.adapters.graft()`; None: the base alone."""
    adapters_of(module).set(name)


def register_pass(rule: Rule[Any, Any]) -> None:
    """Make a pass known from Python, as an entry point of the group `lrc.passes` does. Raises ValueError for a taken name."""
    PASSES.register(rule)


__all__ = [
    "Adapters", "Compiled", "Finished", "adapters_of", "capture", "compile", "compile_to_folder", "load", "plan",
    "register_pass", "set_adapter",
]  # fmt: skip
