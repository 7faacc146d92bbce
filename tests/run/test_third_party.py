"""A pass of another package enters by the same door as ours: an entry point, or one call from Python."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch

import lrc
from lrc.errors import SpecError
from lrc.maps import Dense, LinearMap
from lrc.program import Site
from lrc.run import PassOptions, Statistics, site_pass
from lrc.spec.registry import PASSES

PACKAGE = Path(__file__).parent / "third_party"


class Negate(PassOptions):
    """Turn the sign of weights."""

    type: Literal["negate"] = "negate"
    factor: float = -1.0


@site_pass(Negate)
def negate(site: Site, statistics: Statistics, options: Negate) -> LinearMap:
    """W -> -W, the bias as it was."""
    weight, bias = site.map.dense()
    return Dense(weight * options.factor, bias)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third-party package, built and installed by pip into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("installed")
    tiny.copy_of(PACKAGE, source)  # a build writes beside its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


SCRIPT = """
import contextlib, io, json, sys
import lrc.cli, lrc.run.job, tiny
lrc.run.job.check = tiny.check_here
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lrc", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            lrc.cli.main()
        except SystemExit as end:
            answers.append([end.code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def lrc_with(installed: Path, cwd: Path, *commands: list[str]) -> list[tiny.Answer]:
    """Run commands, one after the other, in a process that sees the package."""
    places = [str(installed), str(Path(tiny.__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return [tiny.Answer(*answer) for answer in json.loads(done.stdout)]


def spec_of(folder: Path, name: str, **options: Any) -> str:
    document = {"version": 1, "passes": [{"type": "halve", **options}], "export": [{"format": "pt2"}]}
    (folder / name).write_text(json.dumps(document))
    return name


def test_an_installed_pass_is_listed_validated_and_compiles_a_model(installed: Path, tmp_path: Path) -> None:
    good, bad = spec_of(tmp_path, "good.yaml", targets=["down"]), spec_of(tmp_path, "bad.yaml", target=["down"])
    listed, refused, done = lrc_with(
        installed, tmp_path, ["list", "passes", "--json"], ["validate", bad],
        ["compile", good, "tiny:mlp_with_inputs", "-o", "out", "--allow-code"],
    )  # fmt: skip
    assert {"factorize", "halve", "merge"} <= set(listed.json["passes"])
    assert (refused.code, refused.error) == (2, "bad.yaml:1: passes.0.target: unknown key `target`; did you mean `targets`?")
    assert done.code == 0, done.err
    (decision,) = json.loads((tmp_path / "out" / "lrc" / "plan.json").read_text())["decisions"]
    assert (decision["type"], decision["sites"]) == ("halve", ["down"])
    model, x = tiny.mlp(), tiny.mlp_inputs(5, seed=9)
    with torch.no_grad():
        found = lrc.load(tmp_path / "out")(x=x)["output"]
        wanted = (model(x) + model.down.bias) / 2
    assert torch.allclose(found, wanted, atol=8 * torch.finfo(torch.float32).eps * float(wanted.abs().max()))


@pytest.fixture
def registered() -> Iterator[None]:
    """The pass `negate`, registered from Python for one test."""
    PASSES.load()
    lrc.register_pass(negate)
    yield
    del PASSES._rules["negate"]


def test_a_pass_is_registered_from_python(registered: None) -> None:
    assert {"factorize", "merge", "negate"} <= set(PASSES.names())
    model, x = tiny.mlp(), tiny.mlp_inputs(5, seed=9)
    spec = {"version": 1, "passes": [{"type": "negate", "targets": ["down"]}]}
    done = lrc.compile(tiny.captured_mlp(), spec)
    wanted = 2 * model.down.bias - model(x)
    assert torch.allclose(done.module(x), wanted, atol=8 * torch.finfo(torch.float32).eps * float(wanted.detach().abs().max()))
    with pytest.raises(SpecError, match=r"passes\.0\.factor: input should be a valid number, got 'two'"):
        lrc.compile(tiny.captured_mlp(), {"version": 1, "passes": [{"type": "negate", "factor": "two"}]})


def test_registering_twice_is_fine_and_another_rule_of_the_name_is_not(registered: None) -> None:
    lrc.register_pass(negate)

    @site_pass(Negate)
    def impostor(site: Site, statistics: Statistics, options: Negate) -> LinearMap:
        return site.map

    with pytest.raises(ValueError, match="pass 'negate' is registered twice: "):
        lrc.register_pass(impostor)


def test_an_unknown_pass_names_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown pass 'factorise'; known: .*factorize, .*merge.*'factorize'"):
        lrc.compile(tiny.captured_mlp(), {"version": 1, "passes": [{"type": "factorise"}]})
