"""The whole job: from a spec to a finished, checked output folder that appears at once."""

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrc.data import Request
from lrc.errors import LrcError, UsageError
from lrc.lower.base import ExportOptions, Written
from lrc.lower.hf_folder import HfExport
from lrc.lower.pt2 import Pt2Export
from lrc.measure import digest
from lrc.program import Program
from lrc.run.environment import environment
from lrc.run.output import OutputFolder, sha256
from lrc.run.pipeline import run_passes
from lrc.run.plan import Plan
from lrc.run.session import Session
from lrc.spec.document import Document
from lrc.spec.load import to_yaml
from lrc.spec.registry import EXPORTERS
from lrc.train.distributed import world
from lrc.verify.decoding import cases_of
from lrc.verify.evaluate import evaluate, judge
from lrc.verify.parity import Artifact, check
from lrc.verify.tolerance import Numerics

Json = dict[str, Any]


@dataclass
class Record:
    """What a run has to tell: the plan, checks, metrics and gates as plain data, and how long things took."""

    plan: Plan
    model: str
    artifacts: Json = field(default_factory=dict)
    parity: list[Json] = field(default_factory=list)
    metrics: list[Json] = field(default_factory=list)
    gates: list[Json] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    training: list[Json] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is to be done. request: how data of the spec is read; finish: files that are written last, from the record.

    plan, original: of a program whose passes have run already, what they did and the program before them.
    """

    program: Program
    document: Document
    session: Session
    request: Request
    spec_text: str
    finish: Callable[[Record, str], Mapping[str, str]]
    plan: Plan | None = None
    original: Program | None = None

    def exports(self) -> list[ExportOptions]:
        """Return what is exported: as the spec says, but always a form that `lrc.load` reads."""
        asked = list(self.document.export)
        unplaced = next((options for options in self.document.passes if not getattr(options, "grafts", True)), None)
        if unplaced is not None and any(isinstance(e, HfExport) for e in asked):
            raise UsageError(
                "export.hf",
                message=f"what the pass `{getattr(unplaced, 'type', '')}` makes has no place in the model's own modules",
                hint="Export `format: pt2` or `onnx`, or set `bases: shared`",
            )
        is_hf = self.program.origin.folder is not None and unplaced is None
        if not any(isinstance(e, HfExport | Pt2Export) for e in asked):
            asked.insert(0, HfExport() if is_hf else Pt2Export())
        return asked  # type: ignore[return-value]

    def key(self) -> str:
        """Return the hash of everything that decides the bytes of the output."""
        document = self.document.resolved()
        document.pop("output")
        files = {name for place, name in self.document.datasets().items() if place != "calibration.dataset"}
        data = {name: sha256(self.request.base / name) for name in files if (self.request.base / name).is_file()}
        return digest("output-2", document, self.program.digest(), data, environment()["versions"])


def compile_to(path: Path, job: Job, *, overwrite: bool = False, resume: bool = True) -> tuple[Record, Path]:
    """Run the job and leave a finished folder at `path`; what a killed run had finished is taken over.

    Checks that fail do not lose the result: it is published with what went wrong in its manifest, and the error is raised
    by the caller from `record.failures`. Of several processes the first one writes; the others run the passes with it.
    """
    if not world().first:
        plan = job.plan or run_passes(job.program, job.document.passes, job.session)
        return Record(plan=plan, model=model_name(job.program)), path
    output = OutputFolder(path, job.key(), overwrite=overwrite, resume=resume)
    with output:
        record = Record(plan=job.plan or Plan(()), model=model_name(job.program))
        original = job.original or job.program.clone()
        for options in job.exports():
            options.check(job.program)
        if job.plan is None:
            with timed(record, "passes"):
                record.plan = run_passes(job.program, job.document.passes, job.session)
        record.training = job.session.training
        for options in job.exports():
            with timed(record, f"export {options.format}"):
                record.artifacts[options.format] = export_step(output, job, options)
        for name, work in (("verify", verify_step), ("evaluate", evaluate_step)):
            with timed(record, name), kept(record, name):
                work(output, job, record, original)
        write_last(output, job, record)
        return record, output.publish()


def model_name(program: Program) -> str:
    """Return what the result is made of as the user named it; of an absolute path the last part, which tells no machine."""
    name = program.origin.name
    return Path(name).name if Path(name).is_absolute() else name


def export_step(output: OutputFolder, job: Job, options: ExportOptions) -> Json:
    """Write one artifact, or take it over; return its path and notes."""
    step, file = f"export-{options.format}", f"lrc/exports/{options.format}.json"
    if not output.finished(step):
        with output.step(step) as scratch:
            written: Written = EXPORTERS.for_options(options)(job.program, scratch, options)
            path = scratch / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(written)), encoding="utf-8")
    job.session.progress("export", 1, 1)
    read: Json = json.loads((output.staging / file).read_text(encoding="utf-8"))
    return read | {
        "opens": options.opens,
        "static": getattr(options, "static", False),
        "options": options.model_dump(mode="json"),
    }


def verify_step(output: OutputFolder, job: Job, record: Record, original: Program) -> None:
    """Reopen every artifact in a fresh process and compare it with the program in memory."""
    pairs = []
    for name, made in record.artifacts.items():
        if not made["opens"]:  # it is no model by itself, and was checked when it was written
            continue
        artifact = Artifact(name, output.staging / made["artifact"], made["opens"], made.get("rounding", 0.0))
        pairs.append((artifact, cases_of(job.program, dynamic=not made["static"], cached=made["cached"])))
    job.session.progress("verify", 0, 1)
    record.parity = [row.row() for row in check(pairs, Numerics.of_program(job.program))]
    job.session.progress("verify", 1, 1)


def evaluate_step(output: OutputFolder, job: Job, record: Record, original: Program) -> None:
    """Measure the spec's metrics on the compressed and on the original program, and judge the gates."""
    spec = job.document.evaluate
    if not spec.metrics:
        return
    job.session.progress("evaluate", 0, 1)
    scores = evaluate(job.program, original, spec, job.request)
    record.metrics = [score.row() for score in scores]
    record.gates = [gate.row() for gate in judge(scores, spec.gates)]
    job.session.progress("evaluate", 1, 1)


def write_last(output: OutputFolder, job: Job, record: Record) -> None:
    """Write what tells about the run: specs, plan, metrics, manifest, and the caller's own files."""
    with output.step("about") as scratch:
        folder = scratch / "lrc"
        folder.mkdir()
        resolved = to_yaml(job.document)
        files: dict[str, str] = {
            "lrc/spec.yaml": job.spec_text,
            "lrc/spec.resolved.yaml": resolved,
            "lrc/plan.json": record.plan.to_json(),
            "lrc/metrics.json": dump({"metrics": record.metrics, "gates": record.gates}),
        }
        files |= job.finish(record, resolved)
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        manifest = manifest_of(output, job, record, {name: scratch / name for name in files})
        (folder / "manifest.json").write_text(dump(manifest), encoding="utf-8")


def manifest_of(output: OutputFolder, job: Job, record: Record, written: Mapping[str, Path]) -> Json:
    """Return what is needed to repeat the run and to trust its files. Times and memory stand here and nowhere else."""
    hashes = {name: value for step in output.steps() for name, value in output.files(step).items()}
    hashes |= {name: sha256(path) for name, path in written.items()}
    return {
        "format": 1,
        "model": record.model,
        "task": job.program.task,
        "environment": environment(),
        "seed": job.session.seed,
        "artifacts": {
            name: {"path": made["artifact"], "notes": made["notes"], "options": made["options"]}
            for name, made in record.artifacts.items()
        },
        "parity": record.parity,
        "failures": record.failures,
        "training": record.training,
        "sha256": dict(sorted(hashes.items())),
        "seconds": {name: round(value, 3) for name, value in record.seconds.items()},
        "peak_memory": {
            "predicted": record.plan.peak_memory,
            "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def dump(data: Any) -> str:
    """Return JSON text with a final newline."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


@contextmanager
def timed(record: Record, name: str) -> Iterator[None]:
    """Note how long a stage took."""
    start = time.perf_counter()
    yield
    record.seconds[name] = time.perf_counter() - start


@contextmanager
def kept(record: Record, name: str) -> Iterator[None]:
    """Note an error of a check instead of losing the result."""
    try:
        yield
    except LrcError as error:
        record.failures.append(str(error))
    except Exception as error:  # data, metrics and artifacts may raise anything
        first = (str(error).strip() or "no message").splitlines()[0]
        record.failures.append(f"{name}: {type(error).__name__}: {first}")


def request_for(program: Program, document: Document, base: Path, *, allow_code: bool) -> Request:
    """Return how `evaluate` data is read: from the spec's folder, with the model's own tokenizer."""
    spec = document.evaluate
    return Request(
        dataset=spec.dataset or "", inputs=list(program.inputs.examples), task=program.task,
        tokenizer=program.origin.folder, base=base, samples=spec.samples, max_length=spec.max_length,
        batch_size=spec.batch_size, draw=False, text_column=spec.text_column, allow_code=allow_code,
    )  # fmt: skip


def calibration_request(program: Program, document: Document, base: Path, *, allow_code: bool) -> Request:
    """Return how `calibration` data is read. Raises UsageError when the spec names none."""
    spec = document.calibration
    if spec is None:
        raise UsageError(
            "calibration",
            message="a pass needs sample inputs, and the spec has no `calibration`",
            hint="Add `calibration: {dataset: FILE}`, or choose `solver: svd` (`criterion: magnitude`), which needs none",
        )
    return Request(
        dataset=spec.dataset, inputs=list(program.inputs.examples), task=program.task, tokenizer=program.origin.folder,
        base=base, samples=spec.samples, max_length=spec.max_length, batch_size=spec.batch_size, seed=spec.seed,
        text_column=spec.text_column, allow_code=allow_code,
    )  # fmt: skip
