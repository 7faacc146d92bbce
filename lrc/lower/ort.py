"""An ONNX file run by ONNX Runtime alone. This module imports no torch: a worker that checks an ONNX file starts fast."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that a stored input may have
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lrc.errors import LowerError, UsageError

Array = NDArray[Any]

PAST = "past_key_values."  # what the names of a cache's inputs start with
NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OrtRunner:
    """A runner on `model.onnx`: arrays (or tensors on the CPU) by name in, numpy arrays by name out.

    Inputs are cast to the type that the graph declares. A missing `attention_mask`, `token_type_ids` or `position_ids` is
    filled as for one unpadded text, a missing key-value cache is empty, missing adapters are those beside the file; an input
    that the graph does not have (exporters drop unused ones) is left out.

    providers: ONNX Runtime's execution providers, the CPU by default. threads: of one operator; None: ONNX Runtime's choice.
    Raises LowerError when the file does not load.
    """

    def __init__(
        self, path: Path | str, *, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
        if threads is not None:
            options.intra_op_num_threads = threads
        self.path = Path(path)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own errors share no base class that is public
            raise LowerError(str(path), message=f"ONNX Runtime cannot load the file: {error}") from error
        self.types = {node.name: node.type for node in self.session.get_inputs()}
        self.shapes = {node.name: node.shape for node in self.session.get_inputs()}
        self.outputs = tuple(node.name for node in self.session.get_outputs())
        beside = self.path.with_name("adapters.safetensors")  # of `adapters: inputs`
        held: dict[str, Array] = load_file(beside) if beside.is_file() else {}
        self.adapters = {name: array for name, array in held.items() if name in self.types}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in its order."""
        return tuple(self.types)

    def __call__(self, **inputs: Any) -> dict[str, Array]:
        """Run once. Raises UsageError for an input that is missing and has no default, or of a type without numpy form."""
        arrays = {name: as_array(value) for name, value in inputs.items() if value is not None}
        feed = {name: self._cast(name, self._take(name, arrays)) for name in self.types}
        return dict(zip(self.outputs, self.session.run(None, feed), strict=True))

    def _take(self, name: str, arrays: Mapping[str, Array]) -> Array:
        if name in arrays:
            return arrays[name]
        if name in self.adapters:
            return self.adapters[name]
        tokens = arrays.get("input_ids")
        past = next((value.shape[2] for key, value in arrays.items() if key.startswith(PAST)), 0)
        if tokens is not None and name.startswith(PAST):
            return self.empty(name, len(tokens))
        if tokens is not None and name == "attention_mask":
            return np.ones((len(tokens), past + tokens.shape[-1]), np.int64)
        if tokens is not None and name == "token_type_ids":
            return np.zeros(tokens.shape, np.int64)
        if tokens is not None and name == "position_ids":
            return np.broadcast_to(np.arange(past, past + tokens.shape[-1]), tokens.shape)
        raise UsageError(
            f"{self.path.name}: {name}", expected="inputs " + ", ".join(self.inputs), got=", ".join(arrays) or "none"
        )

    def empty(self, name: str, batch: int) -> Array:
        """Return an empty key or value of a cache, (batch, heads, 0, features)."""
        _, heads, _, features = self.shapes[name]
        return np.zeros((batch, heads, 0, features), self.numpy_type(name))

    def numpy_type(self, name: str) -> type[np.generic]:
        """Return the numpy type of an input. Raises UsageError for a type without one."""
        declared = self.types[name]
        if declared not in NUMPY_TYPES:
            raise UsageError(f"{self.path.name}: {name}", expected=f"one of {', '.join(NUMPY_TYPES)}", got=declared)
        return NUMPY_TYPES[declared]

    def _cast(self, name: str, value: Array) -> Array:
        return np.ascontiguousarray(value, dtype=self.numpy_type(name))


def as_array(value: Any) -> Array:
    """Return an array, or a tensor on the CPU, as an array; torch gives numpy no bfloat16, so that is widened."""
    return np.asarray(value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value)
