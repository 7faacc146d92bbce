"""The AOTInductor package: native code that answers as the program does, at every shape."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lrc.errors import LowerError, UsageError
from lrc.lower.aoti import AotiExport, AotiRunner, capability, export_aoti, fits, in_words, open_aoti
from lrc.lower.inductor import compiler
from lrc.lower.pt2 import is_package
from lrc.program import Program
from lrc.run.artifact import open_artifact
from lrc.verify.cases import make_cases
from lrc.verify.parity import Artifact, check
from lrc.verify.tolerance import Numerics

needs_compiler = pytest.mark.skipif(compiler() is None, reason="skipped: Inductor needs a C++ compiler (g++ or clang++)")


@pytest.mark.slow
@needs_compiler
def test_a_package_gives_the_same_in_a_fresh_process_at_two_shapes(rewritten: Program, tmp_path: Path) -> None:
    written = export_aoti(rewritten, tmp_path, AotiExport())
    path = tmp_path / written.artifact
    assert written.notes == (f"bound to {capability()}",)
    rows = check(
        [(Artifact("aoti", path, AotiExport.opens), make_cases(rewritten, rewritten.inputs))],
        Numerics.of(rewritten.tensors()),
    )  # fmt: skip
    assert [row.shape for row in rows] == ["1x12", "3x12"]
    assert all(row.ok for row in rows)
    assert is_package(path)
    with pytest.raises(UsageError, match=r"an AOTInductor package is native code.*--allow-code"):
        open_artifact(str(path))
    x = tiny.mlp_inputs(3, seed=8)
    opened = open_artifact(str(path), allow_code=True)(x=x)["output"]
    assert torch.allclose(torch.as_tensor(opened), rewritten(x=x)["output"], atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_an_encoder_with_padding_gives_the_same(encoder: Program, tmp_path: Path, two_shapes: Any) -> None:
    runner = open_aoti(tmp_path / export_aoti(encoder, tmp_path, AotiExport(settings="freezing")).artifact)
    for given in two_shapes.values():
        with torch.no_grad():
            expected = encoder(**given)["last_hidden_state"]
        allowed = Numerics.of(encoder.tensors()).tolerance(expected)
        assert float((runner(**given)["last_hidden_state"] - expected).abs().max()) <= allowed.largest


def test_without_a_compiler_the_export_says_what_to_install(
    rewritten: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(LowerError, match=r"aoti/model\.pt2: Inductor needs a C\+\+ compiler\. Install g\+\+, or set CXX"):
        export_aoti(rewritten, tmp_path, AotiExport())


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no package")
    with pytest.raises(LowerError, match="expected an AOTInductor package for this machine"):
        AotiRunner(tmp_path / "model.pt2")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("static", [False, True])
def test_sizes_that_a_package_was_not_compiled_for_are_refused(rewritten: Program, tmp_path: Path, static: bool) -> None:
    """Native code would answer them with the numbers of another size."""
    runner = open_aoti(tmp_path / export_aoti(rewritten, tmp_path, AotiExport(static=static)).artifact)
    (example,) = rewritten.inputs.examples.values()
    same = runner(x=example.double())["output"]  # cast to what it was compiled for
    assert torch.allclose(same, rewritten(x=example)["output"], atol=1e-5)
    rows, columns = example.shape
    wanted = f"[{rows if static else 'batch'}, {columns}], which the package was compiled for, got "
    wrong = [example[:, :-1], example[0], example[:0]] + ([example[:1]] if static else [])
    for given in wrong:
        with pytest.raises(UsageError, match=re.escape(f"model.pt2: x: expected {wanted}{list(given.shape)}")):
            runner(x=given)
    with pytest.raises(UsageError, match=r"model\.pt2: x: expected inputs x, got y"):
        runner(y=example)


def test_dynamic_sizes_of_one_name_are_equal_and_within_their_bound() -> None:
    known: dict[str, int] = {}
    assert fits(known, 3, ["batch", None])
    assert not fits(known, 4, ["batch", None])
    assert fits(known, 512, ["sequence", 512])
    assert not fits({}, 513, ["sequence", 512])
    assert not fits({}, 0, ["sequence", 512])
    assert in_words(["sequence", 512]) == "sequence <= 512"
