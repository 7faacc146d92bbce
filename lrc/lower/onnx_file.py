"""The ONNX file: torch's own exporter, dynamic sizes, external data for large weights, nothing of this machine in it."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from lrc.errors import LowerError, LrcError, UsageError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.decoder import CachedDecoder, wants_cache
from lrc.lower.onnx_adapters import BESIDE, ListedInputs, WithAdapters, adapter_tensors, save_beside
from lrc.lower.onnx_edits import clean, expand_rotations, name_sizes, name_ties, widen
from lrc.lower.onnx_experts import expert_translations
from lrc.lower.onnx_packed import PackedNodes
from lrc.lower.recurrent import with_operators
from lrc.lower.transposes import share_transposes
from lrc.maps import computed_by
from lrc.program import Program

LARGE = 1_800_000_000  # bytes; a protobuf message ends at 2 GiB
FILE = "onnx/model.onnx"
PREFILL = "prefill only: the graph has no key-value cache"
WIDENED = "bfloat16 is stored as float32: ONNX Runtime has no bfloat16 products on the CPU"


class OnnxExport(ExportOptions):
    """A file that ONNX Runtime serves, with dynamic sizes, checked by `onnx.checker`."""

    format: Literal["onnx"] = "onnx"
    opset: int = Field(
        default=23,
        ge=18,
        description="ONNX operator set. From 23 on, attention is one operator: faster, but what it gives for a text of which "
        "every token is masked is undefined.",
    )
    cache: bool | None = Field(
        default=None,
        description="Take and return the key-value cache, so that each token is computed once. By default the text-generation "
        "models of transformers do; false: the graph of a whole text alone.",
    )
    external_data: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Keep the weights in a file beside model.onnx; auto: where they are larger than 1.8 GB.",
    )
    adapters: Literal["constant", "inputs"] = Field(
        default="constant",
        description="inputs: the trained tensors of unmerged adapters are inputs of the graph, by their names, and the present "
        "ones stand in adapters.safetensors beside it, which the runner reads.",
    )
    quantized: Literal["matmul_nbits", "dequantize"] = Field(
        default="matmul_nbits",
        description="How weights of integers in blocks are multiplied: by ONNX Runtime's MatMulNBits, or by the standard's "
        "DequantizeLinear and MatMul (from opset 21 on), for other runtimes too.",
    )
    accuracy_level: Literal[0, 4] = Field(
        default=4,
        description="Of MatMulNBits: 4 rounds inputs to 8 bits, which is what makes it fast; 0 multiplies in float32.",
    )
    opens: ClassVar[str] = "lrc.lower.ort:OrtRunner"
    artifact: ClassVar[str] = FILE

    def check(self, program: Program) -> None:
        """Raise UsageError for a cache that cannot be exported, or a form that the operator set has not."""
        wants_cache(program, self.cache)
        if self.quantized == "dequantize" and self.opset < 21:
            raise UsageError(
                "export.opset", expected="at least 21, from which on DequantizeLinear has blocks", got=str(self.opset)
            )


@exporter(OnnxExport)
def export_onnx(program: Program, folder: Path, options: OnnxExport) -> Written:
    """Write `onnx/model.onnx`.

    Raises UsageError for a cache that cannot be exported; LowerError when an operation has no ONNX form, or the file does not
    check.
    """
    onnx = _need_onnx()
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    cached = wants_cache(program, options.cache)
    as_inputs = options.adapters == "inputs"
    packed = PackedNodes(options.opset)
    with computed_by(packed):
        model = lowered(program, cached, options.opset, as_inputs)
    level = 4 if options.quantized == "dequantize" else options.accuracy_level  # ONNX Runtime's own choice when it fuses
    packed_notes = packed.settle(model, options.quantized, level)
    clean(model)
    if cached:
        name_ties(model, program)
    else:
        name_sizes(model, program)
        expand_rotations(model)
    share_transposes(model)
    notes = packed_notes + ([WIDENED] if widen(model) else [])
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)  # protobuf cannot tell the size of what is too large
    external = options.external_data == "always" or (options.external_data == "auto" and size > LARGE)
    extra: dict[str, Any] = {}
    if external:
        extra = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": "model.onnx.data"}
    onnx.save(model, path, **extra)
    if as_inputs:
        save_beside(program, path.with_name(BESIDE))
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise LowerError(FILE, message=f"onnx.checker refuses the file: {error}") from error
    notes += [PREFILL] if program.task == "text-generation" and not cached else []
    return Written(FILE, tuple(notes), cached, packed.rounding(level))


def lowered(program: Program, cached: bool, opset: int, as_inputs: bool = False) -> Any:
    """Return what torch's exporter makes of a program, or of its decoder with a cache. Raises LowerError or UsageError.

    as_inputs: the tensors of adapters are inputs, after the others.
    """
    import torch.onnx

    given: dict[str, Any]
    module: Any
    try:
        if cached:
            module = CachedDecoder(program)
            given = module.export_arguments(program.inputs.examples)
        else:
            module = with_operators(program).export()
            given = {"args": (), "kwargs": dict(program.inputs.examples), "output_names": output_names(program)}
        if as_inputs:
            module, given = with_adapters(program, module, given)
        with torch.no_grad(), quiet_exporter():
            made = torch.onnx.export(
                module,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                custom_translation_table=dict(expert_translations()),
                **given,
            )
    except LrcError:
        raise
    except Exception as error:  # the exporter raises what its passes raise
        hint = "Set `cache: false`, or leave out `format: onnx`" if cached else "Leave out `format: onnx`"
        raise LowerError(FILE, message=f"torch.onnx refused the program: {root_cause(error)}", hint=hint) from error
    assert made is not None, "torch.onnx.export with dynamo returns a program"
    return made.model_proto


def with_adapters(program: Program, module: Any, given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a module that takes its adapters too, and the arguments of its export."""
    tensors = adapter_tensors(program)
    inner: nn.Module
    examples = program.inputs.examples
    if isinstance(module, CachedDecoder):
        args, shapes = given["args"], tuple(given["dynamic_shapes"])
        inner, names = module, given["input_names"]
    else:
        args, shapes = ([*examples.values()],), ([program.inputs.dims().get(name) for name in examples],)
        inner, names = ListedInputs(program.graph_module, list(examples)), list(examples)
    return WithAdapters(inner), {
        "args": (tensors, *args),
        "dynamic_shapes": ({"adapters": dict.fromkeys(tensors), "args": shapes}),
        "input_names": [*tensors, *names],
        "output_names": given["output_names"],
    }


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


def root_cause(error: BaseException) -> str:
    """Return the first line of the innermost error: the outer ones tell how to report a bug of the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def output_names(program: Program) -> list[str]:
    """Return the names of the program's outputs, in order."""
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    return list(output.args[0])


def _need_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise LowerError("onnx", message=f"the export needs {error.name}", hint="pip install onnx onnxscript") from error
    return onnx
