"""The exported program as a file: data alone, read by torch without our package."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.errors import CaptureError
from lrc.lower.pt2 import Pt2Export, Pt2Runner, export_pt2, is_package
from lrc.program import Program
from lrc.verify.tolerance import Numerics

ALONE = """
import torch
module = torch.export.load(FILE).module()
for case in "ab":
    outputs[case] = module(x=inputs[case])["output"]
assert "lrc" not in sys.modules
"""


@pytest.fixture
def file(rewritten: Program, tmp_path: Path) -> Path:
    """The saved program."""
    return tmp_path / export_pt2(rewritten, tmp_path, Pt2Export()).artifact


def test_torch_alone_gives_the_same_at_two_shapes(file: Path, rewritten: Program, fresh: Callable[..., Any]) -> None:
    inputs = {"a": tiny.mlp_inputs(2, seed=5), "b": tiny.mlp_inputs(17, seed=6)}
    found = fresh(ALONE.replace("FILE", repr(str(file))), inputs)
    for case, x in inputs.items():
        expected = rewritten(x=x)["output"].detach()
        allowed = Numerics.of(rewritten.tensors()).tolerance(expected)
        assert float((found[case] - expected).abs().max()) <= allowed.largest


def test_saving_and_capturing_again_gives_the_same_graph_and_numbers(file: Path, rewritten: Program) -> None:
    again = lrc.capture(file)
    x = tiny.mlp_inputs(7, seed=5)
    assert torch.equal(again(x=x)["output"], rewritten(x=x)["output"])
    assert set(again.tensors()) == set(rewritten.tensors())
    assert again.inputs.dynamic == {"x": {0: "batch"}}


def test_nothing_in_the_file_tells_of_the_machine(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not [word for word in (b"/work", b"/tmp", b"/root", b"site-packages", b"Traceback") if word in content], name


def test_the_file_is_a_graph_and_no_native_code(file: Path) -> None:
    assert not is_package(file)


def test_the_same_program_gives_the_same_bytes(rewritten: Program, tmp_path: Path) -> None:
    for name in "ab":
        export_pt2(rewritten, tmp_path / name, Pt2Export())
    assert (tmp_path / "a/program.pt2").read_bytes() == (tmp_path / "b/program.pt2").read_bytes()


def test_pickled_objects_in_a_file_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name))
        root = archive.namelist()[0].split("/")[0]
        changed.writestr(f"{root}/data/constants/custom_obj_0", pickle.dumps(print))
    with pytest.raises(CaptureError, match=r"the file holds pickled objects \(.*custom_obj_0\), which could run code"):
        Pt2Runner(other)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "program.pt2").write_bytes(content)
    with pytest.raises(CaptureError, match=r"expected a program saved by torch\.export\.save, got a damaged or other file"):
        Pt2Runner(tmp_path / "program.pt2")
