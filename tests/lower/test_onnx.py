"""The ONNX file: it checks, it runs without us, it says nothing of the machine that made it."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.api import Finished
from lrc.errors import LowerError, UsageError
from lrc.lower.onnx_file import FILE, WIDENED, OnnxExport, export_onnx
from lrc.lower.ort import OrtRunner
from lrc.program import Program
from lrc.verify.cases import make_cases
from lrc.verify.parity import compare
from lrc.verify.runner import run
from lrc.verify.tolerance import Numerics

PRIVATE = (b"/work", b"/tmp", b"/root", b"site-packages", b".py", b"Traceback")
ALONE = """
import onnxruntime
session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
for case in "ab":
    given = {k[2:]: v for k, v in inputs.items() if k.startswith(case)}
    outputs[case] = session.run(["last_hidden_state"], given)[0]
"""


def parity(program: Program, path: Path) -> bool:
    """Whether the file answers as the program does, at two shapes with padding."""
    runner = OrtRunner(path)
    numerics = Numerics.of(program.tensors())
    cases = make_cases(program, program.inputs)
    return all(row.ok for case in cases for row in compare("onnx", case, run(runner, case.inputs), numerics))


def messages_of(model: Any) -> Iterator[Any]:
    """Every part of a file that could hold a text."""
    yield model
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        yield graph
        yield from [*graph.node, *graph.value_info, *graph.input, *graph.output, *getattr(graph, "initializer", ())]
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]


def test_onnxruntime_alone_gives_the_same_at_two_shapes_with_padding(
    finished: Finished, encoder: Program, fresh: Callable[..., Any], two_shapes: Mapping[str, dict[str, Tensor]]
) -> None:
    inputs = {f"{case}/{name}": value for case, given in two_shapes.items() for name, value in given.items()}
    found = fresh(ALONE.replace("FILE", repr(str(finished.path / FILE))), inputs, torch=False)
    for case, given in two_shapes.items():
        with torch.no_grad():
            expected = encoder(**given)["last_hidden_state"]
        allowed = Numerics.of(encoder.tensors()).tolerance(expected)
        assert float((found[case] - expected).abs().max()) <= allowed.largest


def test_the_run_itself_checked_two_shapes_in_a_fresh_process(finished: Finished) -> None:
    rows = [row for row in finished.record.parity if row["format"] == "onnx"]
    assert {row["shape"] for row in rows} == {"1x9", "3x20"}
    assert all(row["ok"] for row in rows)


def test_the_file_checks_and_its_sizes_have_names(finished: Finished) -> None:
    onnx.checker.check_model(finished.path / FILE, full_check=True)
    graph = onnx.load(finished.path / FILE).graph
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    text = ["batch", "sequence"]
    assert sizes == {
        "input_ids": text, "token_type_ids": text, "attention_mask": text,
        "last_hidden_state": [*text, 32], "pooler_output": ["batch", 32],
    }  # fmt: skip


def test_nothing_in_the_file_tells_of_the_machine(finished: Finished, bert: Path) -> None:
    content = (finished.path / FILE).read_bytes()
    assert not [word for word in (*PRIVATE, bytes(bert)) if word in content]
    model = onnx.load(finished.path / FILE)
    assert (model.producer_name, model.producer_version) == ("lrc", "")
    for part in messages_of(model):
        assert part.doc_string == ""
        assert not part.metadata_props


def test_external_data_stands_beside_the_file(tmp_path: Path) -> None:
    """Tensors of less than 1 kB stay in the file."""
    program = lrc.capture(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)), torch.randn(4, 40))
    written = export_onnx(program, tmp_path, OnnxExport(external_data="always"))
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(tmp_path / written.artifact, full_check=True)
    assert parity(program, tmp_path / written.artifact)
    assert not [word for word in PRIVATE if word in (tmp_path / FILE).read_bytes()]
    moved = tmp_path / "elsewhere"
    (tmp_path / "onnx").rename(moved)
    assert parity(program, moved / "model.onnx")


@pytest.mark.slow
def test_a_model_beyond_the_two_gibibytes_of_a_protobuf_message_is_exported_and_runs(tmp_path: Path) -> None:
    memory, disk = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), shutil.disk_usage(tmp_path).free
    if min(memory / 12e9, disk / 5e9) < 1:
        pytest.skip("skipped: a model of more than 2 GiB needs 12 GB of memory and 5 GB of disk")
    large = 23_200
    module = nn.Sequential(nn.Linear(8, large, bias=False), nn.Linear(large, large, bias=False), nn.Linear(large, 2)).eval()
    program = lrc.capture(module, torch.randn(2, 8))
    written = export_onnx(program, tmp_path, OnnxExport())
    data = tmp_path / "onnx" / "model.onnx.data"
    try:
        assert data.stat().st_size > 2**31
        assert (tmp_path / FILE).stat().st_size < 10_000
        assert parity(program, tmp_path / written.artifact)
    finally:
        data.unlink(missing_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 products on the CPU, so such a model is stored as float32, with a note."""
    program = lrc.capture(tiny.mlp().to(dtype), {"x": tiny.mlp_inputs().to(dtype)})
    written = export_onnx(program, tmp_path, OnnxExport())
    types = {tensor.data_type for tensor in onnx.load(tmp_path / FILE).graph.initializer}
    half = dtype == torch.float16
    assert types == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    assert written.notes == (() if half else (WIDENED,))
    assert parity(program, tmp_path / FILE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "dtype"),
    [(tiny.write_bert, torch.bfloat16), (tiny.write_llama, torch.float16), (tiny.write_gpt2, torch.bfloat16)],
)
def test_half_precision_transformers_run_on_the_cpu(write: Callable[..., Path], dtype: torch.dtype, tmp_path: Path) -> None:
    program = lrc.capture(str(write(tmp_path / "model", dtype=dtype)))
    written = export_onnx(program, tmp_path, OnnxExport())
    assert (WIDENED in written.notes) == (dtype == torch.bfloat16)
    assert parity(program, tmp_path / FILE)


def test_a_decoder_is_said_to_be_prefill_only(rewritten: Program, tmp_path: Path) -> None:
    twin = rewritten.clone()
    twin.origin = replace(twin.origin, task="text-generation")
    written = export_onnx(twin, tmp_path, OnnxExport(opset=20))
    assert written.notes == ("prefill only: the graph has no key-value cache",)
    assert {(o.domain, o.version) for o in onnx.load(tmp_path / FILE).opset_import} >= {("", 20)}


def test_an_operation_without_onnx_form_is_an_error_with_its_name(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.fc(x))

    program = lrc.capture(Bessel(), {"x": torch.randn(2, 3)})
    with pytest.raises(LowerError, match=r"torch\.onnx refused the program: .*bessel_j0.*Leave out `format: onnx`"):
        export_onnx(program, tmp_path, OnnxExport())


def test_the_runner_fills_what_one_unpadded_text_needs(finished: Finished, encoder: Program) -> None:
    runner = OrtRunner(finished.path / FILE)
    ids = np.array([[4, 5, 6, 7]], dtype=np.int32)  # cast to what the graph declares
    with torch.no_grad():
        expected = encoder(input_ids=torch.from_numpy(ids).long())["last_hidden_state"].numpy()
    np.testing.assert_allclose(runner(input_ids=ids, unknown=ids)["last_hidden_state"], expected, atol=1e-5)


def test_the_runner_names_an_input_that_is_missing(finished: Finished) -> None:
    runner = OrtRunner(finished.path / FILE)
    wanted = r"model\.onnx: input_ids: expected inputs input_ids, token_type_ids, attention_mask, got none"
    with pytest.raises(UsageError, match=wanted):
        runner()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LowerError, match="ONNX Runtime cannot load the file"):
        OrtRunner(tmp_path / "model.onnx")
