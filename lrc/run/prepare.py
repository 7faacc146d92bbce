"""From a spec and a model to what a run needs: the captured program, the session, checks before any work."""

import atexit
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lrc.data import Batches, batches_of, is_factory, load_batches
from lrc.errors import UsageError
from lrc.measure import Cache
from lrc.program import Program
from lrc.program.capture import capture_exported, capture_graph, capture_module
from lrc.program.random_init import renewed
from lrc.program.source import Source, load_program, no_start
from lrc.run.job import calibration_request, request_for
from lrc.run.session import Progress, Session, silent
from lrc.run.trials import Evaluation
from lrc.spec.document import Document
from lrc.spec.load import load_document
from lrc.verify.metrics.base import MetricOptions

CACHE = ".lrc-cache"
NEEDS = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
Model = str | Path | nn.Module | torch.export.ExportedProgram | Program
Spec = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A spec that has been read and a model that has been captured."""

    program: Program
    document: Document
    file: Path | None
    session: Session

    @property
    def base(self) -> Path:
        """The folder that data paths of the spec start at."""
        return self.file.parent if self.file else Path()


def read_spec(spec: Spec, overrides: Sequence[str] = ()) -> tuple[Document, Path | None]:
    """Return the document and its file, with the packages that its exports need checked. Raises SpecError or UsageError."""
    document, file = load_document(spec, overrides)
    for options in document.export:
        name = str(getattr(options, "format", ""))
        for package in NEEDS.get(name, ()):
            if importlib.util.find_spec(package) is None:
                extra = "'lrc-compiler[hf]'" if package == "transformers" else package
                raise UsageError(
                    f"export.{name}",
                    message=f"needs {package}, which is not installed",
                    hint=f"pip install {extra}",
                )
    return document, file


def prepare(
    model: Model | None,
    spec: Spec,
    *,
    overrides: Sequence[str] = (),
    inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    output: Path | None = None,
    cache: Path | None = None,
    allow_code: bool = False,
    progress: Progress = silent,
) -> Prepared:
    """Read the spec, load and capture the model, and set the session up. Nothing is measured or changed yet.

    inputs: examples for a module. calibration: batches of a Python caller, in place of the spec's data.
    """
    document, file = read_spec(spec, overrides)
    base = file.parent if file else Path()
    check_data(document, base, calibration=calibration is None)
    progress("capture", 0, 1)
    program = capture(model, document=document, inputs=inputs, allow_code=allow_code, base=base)
    progress("capture", 1, 1)
    spec_cache = document.calibration.cache if document.calibration else None
    place = cache or (Path(spec_cache) if spec_cache else cache_beside(document, output, in_memory=isinstance(spec, Mapping)))
    session = Session(
        cache=Cache(place),
        batches=batches_for(program, document, base, calibration, allow_code),
        seed=document.calibration.seed if document.calibration else 0,
        spec_path=file,
        progress=progress,
        has_data=calibration is not None or document.calibration is not None,
        evaluation=Evaluation(document.evaluate, request_for(program, document, base, allow_code=allow_code)),
        pareto=document.pareto,
        allow_code=allow_code,
        by_block=document.calibration.by_block if document.calibration else "auto",
    )
    return Prepared(program, document, file, session)


def cache_beside(document: Document, output: Path | None, *, in_memory: bool) -> Path:
    """Return where statistics are kept: beside the output, or for a mapping that names none, in a folder of this process."""
    if output is None and in_memory and "output" not in document.model_fields_set:
        return of_process()
    return (output or Path(document.output)).absolute().parent / CACHE


@functools.cache
def of_process() -> Path:
    """Return a temporary folder that all calls of this process share, removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="lrc-cache-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def check_data(document: Document, base: Path, *, calibration: bool = True) -> None:
    """Raise UsageError for a missing file, or a metric that cannot be: before a model is loaded, not after all else is done."""
    judged = document.evaluate
    for i, options in enumerate(judged.metrics):
        assert isinstance(options, MetricOptions)
        options.check(judged.max_length, f"evaluate.metrics.{i}")
    for place, dataset in document.datasets().items():
        if place == "calibration.dataset" and not calibration:
            continue
        if not is_factory(dataset) and not (base / dataset).is_file():
            raise UsageError(
                f"{place}: {base / dataset}", message="no such file", hint="Paths in a spec start at the spec's own folder"
            )  # fmt: skip


def batches_for(
    program: Program, document: Document, base: Path, given: Iterable[Any] | None, allow_code: bool
) -> Callable[[], Batches]:
    """Return what makes the calibration batches when a statistic is first needed."""
    if given is not None:
        made = batches_of(given, list(program.inputs.examples))
        return lambda: made
    return lambda: load_batches(calibration_request(program, document, base, allow_code=allow_code))


def capture(
    model: Model | None,
    *,
    document: Document | None = None,
    inputs: Any = None,
    allow_code: bool = False,
    base: Path = Path(),
    weights: bool = True,
) -> Program:
    """Return the captured program of anything that is a model; MODEL wins over the spec's `model.path`.

    weights: False captures a Hugging Face folder without reading its weights. Raises UsageError when there is no model.
    """
    spec = (document or Document(version=1)).model
    model = spec.path if model is None else model
    seed = spec.init.seed
    if isinstance(model, Program | torch.export.ExportedProgram):
        if seed is not None:
            raise no_start(type(model).__name__)
        return model.clone() if isinstance(model, Program) else capture_exported(model)  # passes edit what they are given
    if isinstance(model, nn.Module):
        if inputs is None:
            raise UsageError(type(model).__name__, message="a module needs example inputs", hint="Give `inputs=`")
        model = model if seed is None else renewed(model, seed)
        program = capture_graph(model, inputs) if isinstance(model, fx.GraphModule) else capture_module(model, inputs)
        return replace_task(program, spec.task)
    if model is None:
        raise UsageError("MODEL", message="no model is named", hint="Give MODEL, or set `model.path` in the spec")
    source = Source(str(model), spec.task, spec.dtype, spec.device, spec.weights, spec.revision, spec.trust_remote_code, seed)
    examples = inputs
    if examples is None and document is not None and ":" in source.path and document.calibration is not None:
        examples = _first_batch(document, base, allow_code)
    return load_program(source, allow_code=allow_code, inputs=examples, weights=weights)


def replace_task(program: Program, task: str | None) -> Program:
    """Set the task of a program, where one is given."""
    if task is not None:
        program.origin = replace(program.origin, task=task)
    return program


def _first_batch(document: Document, base: Path, allow_code: bool) -> Any:
    """Return the first calibration batch of arrays, as examples for a module that comes without any."""
    from lrc.data.files import read_arrays

    assert document.calibration is not None
    dataset = document.calibration.dataset
    if is_factory(dataset):
        return None
    path = base / dataset
    if path.suffix not in (".npz", ".safetensors"):
        return None
    arrays = read_arrays(path)
    return {name: a[: max(2, min(4, len(a)))] for name, a in arrays.items() if name != "labels"}
