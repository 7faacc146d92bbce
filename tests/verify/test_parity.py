"""Parity: every artifact, reopened and compared; one that was tampered with is caught."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lrc
from lrc.api import Finished, compile_to_folder
from lrc.errors import GateError, LowerError
from lrc.lower.hf_folder import HfExport
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.program import Inputs, Program
from lrc.verify import parity
from lrc.verify.cases import Case, make_cases, resized, save_cases, with_padding
from lrc.verify.parity import Artifact, check, compare, error_of
from lrc.verify.tolerance import Numerics

FLOAT = Numerics(torch.float32, 3, 20)


def case(expected: Tensor) -> Case:
    return Case({"x": torch.zeros(2, 3)}, {"y": expected})


def change_a_weight(path: Path, by: float = 0.05) -> None:
    """Add a little to one number of the first matrix in an ONNX file."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """The perceptron and its ONNX file."""
    folder, program = tmp_path_factory.mktemp("exported"), tiny.captured_mlp()
    return program, folder / export_onnx(program, folder, OnnxExport()).artifact


def onnx_rows(program: Program, path: Path) -> list[parity.Parity]:
    cases = make_cases(program, program.inputs)
    return check([(Artifact("onnx", path, OnnxExport.opens), cases)], Numerics.of(program.tensors()))


def test_an_artifact_as_it_was_written_passes_in_a_fresh_process(exported: tuple[Program, Path]) -> None:
    rows = onnx_rows(*exported)
    assert [(row.format, row.shape, row.output, row.ok) for row in rows] == [
        ("onnx", "1x12", "output", True), ("onnx", "3x12", "output", True)
    ]  # fmt: skip
    assert all(0 <= row.mean <= row.largest <= row.allowed for row in rows)


def test_one_changed_weight_in_an_onnx_file_is_caught(exported: tuple[Program, Path], tmp_path: Path) -> None:
    program, path = exported
    shutil.copy(path, tmp_path / "model.onnx")
    change_a_weight(tmp_path / "model.onnx")
    rows = onnx_rows(program, tmp_path / "model.onnx")
    assert not all(row.ok for row in rows)  # a unit may be silent on one of the inputs
    assert max(row.largest / row.allowed for row in rows) > 10


def test_one_changed_weight_in_a_folder_is_caught(finished: Finished, bert: Path, spec: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.path, tmp_path / "copy"))
    program = lrc.compile(str(bert), spec, cache=finished.path.parent / ".lrc-cache").program
    artifact = Artifact("hf", folder / "config.json", HfExport.opens)
    cases, numerics = make_cases(program, program.inputs), Numerics.of(program.tensors())
    assert all(row.ok for row in tiny.check_here([(artifact, cases)], numerics))
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][3] += 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not all(row.ok for row in tiny.check_here([(artifact, cases)], numerics))


def test_a_job_with_a_changed_artifact_ends_with_the_gate_and_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampered(artifacts: Sequence[tuple[Artifact, Sequence[Case]]], numerics: Numerics) -> Any:
        change_a_weight(next(a.path for a, _ in artifacts if a.format == "onnx"))
        return tiny.check_here(artifacts, numerics)

    monkeypatch.setattr("lrc.run.job.check", tampered)
    spec = tiny.factorize(rank=3) | {"export": [{"format": "pt2"}, {"format": "onnx"}]}
    done = compile_to_folder(tiny.captured_mlp(), spec, output=tmp_path / "out")
    assert {row["format"]: row["ok"] for row in done.record.parity} == {"pt2": True, "onnx": False}
    with pytest.raises(GateError, match=r"onnx at 3x12: output differs by 0\.\d+, allowed .*The result was written") as caught:
        done.raise_on_failure()
    assert caught.value.exit_code == 3
    assert (tmp_path / "out" / "program.pt2").is_file()


def test_an_artifact_that_does_not_open_says_why(tmp_path: Path, exported: tuple[Program, Path]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    wanted = r"onnx: model\.onnx: the artifact does not run in a fresh process: .*ONNX Runtime cannot load the file"
    with pytest.raises(LowerError, match=wanted):
        onnx_rows(exported[0], tmp_path / "model.onnx")


def test_an_artifact_that_never_answers_is_given_up(exported: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TIMEOUT", 0)
    with pytest.raises(LowerError, match="onnx: the artifact gave no answer in 0 s"):
        onnx_rows(*exported)


# Comparing.


def test_equal_outputs_differ_by_nothing() -> None:
    (row,) = compare("pt2", case(torch.ones(2, 3)), {"y": torch.ones(2, 3)}, FLOAT)
    assert (row.shape, row.output, row.largest, row.mean, row.ok) == ("2x3", "y", 0.0, 0.0, True)


def test_a_mean_error_within_the_peak_is_caught_too() -> None:
    """A small fault in every output: each value is within the largest allowed error, their mean is not."""
    expected = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    allowed = FLOAT.tolerance(expected)
    (row,) = compare("pt2", case(expected), {"y": expected.double() + 3 * allowed.mean}, FLOAT)
    assert row.largest < row.allowed
    assert not row.ok


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [(1.0, 1.0, 0.0), (1.5, 1.0, 0.5), ("inf", "inf", 0.0), ("-inf", "inf", "inf"), ("nan", 1.0, "inf"), ("nan", "nan", "inf")],
)
def test_the_error_of_a_value_is_a_number_or_infinite(found: Any, expected: Any, error: Any) -> None:
    assert float(error_of(torch.tensor([float(found)]), torch.tensor([float(expected)]))) == float(error)


def test_a_missing_output_and_one_of_another_shape_are_errors() -> None:
    with pytest.raises(LowerError, match=r"pt2: y: expected an output of shape \(2, 3\), got outputs z"):
        compare("pt2", case(torch.ones(2, 3)), {"z": torch.ones(2, 3)}, FLOAT)
    with pytest.raises(LowerError, match=r"pt2: y: expected an output of shape \(2, 3\), got shape \(3, 2\)"):
        compare("pt2", case(torch.ones(2, 3)), {"y": torch.ones(3, 2)}, FLOAT)


def test_an_output_without_values_is_fine() -> None:
    (row,) = compare("pt2", case(torch.ones(0, 3)), {"y": torch.ones(0, 3)}, FLOAT)
    assert row.ok


# The inputs.


def text_inputs(**largest: int) -> Inputs:
    ids = torch.arange(14).reshape(2, 7)
    examples = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7).expand(2, 7)}
    return Inputs(examples, {name: {0: "batch", 1: "sequence"} for name in examples}, largest)


def answer(**inputs: Tensor) -> dict[str, Tensor]:
    return {"y": inputs["input_ids"] * inputs["attention_mask"]}


def test_there_are_two_shapes_the_second_with_padding() -> None:
    one, two = make_cases(answer, text_inputs())
    assert (one.shape, two.shape) == ("1x9", "3x20")
    assert bool(one.inputs["attention_mask"].all())
    assert two.inputs["attention_mask"].sum(1).tolist() == [14, 20, 20]
    assert torch.equal(two.expected["y"], answer(**two.inputs)["y"])


def test_positions_stay_in_order_and_values_come_from_the_examples() -> None:
    _, two = make_cases(answer, text_inputs())
    assert two.inputs["position_ids"][0].tolist() == [i % 7 for i in range(20)]
    assert set(two.inputs["input_ids"].unique().tolist()) <= set(range(14))


def test_sizes_stay_within_the_bound_of_the_model() -> None:
    assert [c.shape for c in make_cases(answer, text_inputs(sequence=12))] == ["1x9", "3x12"]


def test_the_same_seed_gives_the_same_inputs() -> None:
    one, two = (make_cases(answer, text_inputs())[1].inputs["input_ids"] for _ in range(2))
    assert torch.equal(one, two)


def test_an_artifact_of_fixed_shape_is_checked_at_that_shape() -> None:
    assert [c.shape for c in make_cases(answer, text_inputs(), dynamic=False)] == ["2x7", "2x7"]


def test_inputs_without_a_mask_are_not_padded() -> None:
    inputs = {"x": torch.ones(2, 3)}
    assert with_padding(inputs) is inputs


def test_cases_are_stored_by_number_and_name() -> None:
    stored = save_cases(make_cases(answer, text_inputs()))
    assert sorted(stored) == [f"{i}/{name}" for i in range(2) for name in ("attention_mask", "input_ids", "position_ids")]


def test_sizes_that_are_not_asked_for_stay() -> None:
    made = resized(text_inputs(), {"batch": 4}, torch.Generator().manual_seed(0))
    assert made["input_ids"].shape == (4, 7)
    np.testing.assert_array_equal(made["input_ids"].numpy() % 7, np.broadcast_to(made["input_ids"].numpy()[0] % 7, (4, 7)))
