"""The ONNX file: torch's own exporter, dynamic sizes, external data for large weights, nothing of this machine in it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.program import Program

LARGE = 1_800_000_000  # bytes; a protobuf message ends at 2 GiB
FILE = "onnx/model.onnx"


class OnnxExport(ExportOptions):
    """A file that ONNX Runtime serves, with dynamic sizes, checked by `onnx.checker`."""

    format: Literal["onnx"] = "onnx"
    opset: int | None = Field(default=None, ge=18, description="ONNX operator set; the exporter's own default without it.")
    external_data: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Keep the weights in a file beside model.onnx; auto: where they are larger than 1.8 GB.",
    )
    opens: ClassVar[str] = "lrc.lower.ort:OrtRunner"
    artifact: ClassVar[str] = FILE


@exporter(OnnxExport)
def export_onnx(program: Program, folder: Path, options: OnnxExport) -> Written:
    """Write `onnx/model.onnx`. Raises LowerError when an operation has no ONNX form, or the file does not check."""
    onnx = _need_onnx()
    import torch.onnx

    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), quiet_exporter():
            made = torch.onnx.export(
                program.export(), (), kwargs=dict(program.inputs.examples), dynamo=True, verbose=False,
                opset_version=options.opset, output_names=output_names(program),
            )  # fmt: skip
    except Exception as error:  # the exporter raises what its passes raise
        raise LowerError(
            FILE,
            message=f"torch.onnx refused the program: {str(error).strip().splitlines()[0]}",
            hint="Leave out `format: onnx`",
        ) from error
    assert made is not None, "torch.onnx.export with dynamo returns a program"
    model = made.model_proto
    clean(model)
    external = options.external_data == "always" or (options.external_data == "auto" and model.ByteSize() > LARGE)
    extra: dict[str, Any] = {}
    if external:
        extra = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": "model.onnx.data"}
    onnx.save(model, path, **extra)
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise LowerError(FILE, message=f"onnx.checker refuses the file: {error}") from error
    notes = ["prefill only: the graph has no key-value cache"] if program.task == "text-generation" else []
    return Written(FILE, tuple(notes))


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks about its own internals, and about packages that we do not use, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def output_names(program: Program) -> list[str]:
    """Return the names of the program's outputs, in order."""
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    return list(output.args[0])


def clean(model: Any) -> None:
    """Remove what tells of the machine and the code that made the file: stack traces, paths, notes of the exporter."""
    model.producer_name, model.producer_version, model.doc_string = "lrc", "", ""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in [*graph.node, *getattr(graph, "initializer", ()), *graph.value_info, *graph.input, *graph.output]:
            if isinstance(value, str):  # inputs of a function
                continue
            value.doc_string = ""
            del value.metadata_props[:]
        for node in graph.node:
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _need_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise LowerError("onnx", message=f"the export needs {error.name}", hint="pip install onnx onnxscript") from error
    return onnx
