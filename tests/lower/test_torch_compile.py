"""torch.compile: settings beside the result, checked by compiling it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from lrc.errors import LowerError
from lrc.lower.inductor import SETTINGS, CompiledRunner, TorchCompileExport, compiler, export_torch_compile, open_settings
from lrc.lower.pt2 import Pt2Export, export_pt2
from lrc.program import Program

needs_compiler = pytest.mark.skipif(compiler() is None, reason="skipped: Inductor needs a C++ compiler (g++ or clang++)")


@needs_compiler
def test_the_settings_are_written_as_data(rewritten: Program, tmp_path: Path) -> None:
    written = export_torch_compile(rewritten, tmp_path, TorchCompileExport(settings="freezing", dynamic=False))
    assert json.loads((tmp_path / written.artifact).read_text()) == {"options": {"freezing": True}, "dynamic": False}
    assert written.notes == ("compiled again in every process that loads it",)


@pytest.mark.slow
@needs_compiler
def test_the_folder_opens_compiled_and_gives_the_same_at_two_shapes(rewritten: Program, tmp_path: Path) -> None:
    export_pt2(rewritten, tmp_path, Pt2Export())
    written = export_torch_compile(rewritten, tmp_path, TorchCompileExport())
    shutil.move(tmp_path, moved := tmp_path.with_name("moved"))
    tmp_path.mkdir()
    runner = open_settings(moved / written.artifact)
    for rows in (3, 8):
        x = tiny.mlp_inputs(rows, seed=rows)
        assert torch.allclose(runner(x=x)["output"], rewritten(x=x)["output"], atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_a_module_is_compiled_with_named_settings(rewritten: Program) -> None:
    x = tiny.mlp_inputs(4, seed=3)
    module = rewritten.module()
    with torch.no_grad():
        assert torch.allclose(CompiledRunner(module, SETTINGS["default"], True)(x=x)["output"], module(x), atol=1e-5)
    assert list(SETTINGS) == ["default", "freezing", "max_autotune"]


def test_without_a_compiler_the_export_says_what_to_install(
    rewritten: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(LowerError, match=r"Inductor needs a C\+\+ compiler\. Install g\+\+, or set CXX"):
        export_torch_compile(rewritten, tmp_path, TorchCompileExport())
