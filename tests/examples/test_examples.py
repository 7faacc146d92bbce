"""The examples are what a user runs first: they run."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def compile_module() -> Iterator[ModuleType]:
    """The example as a module; it seeds torch, which is put back."""
    spec = importlib.util.spec_from_file_location("compile_module", EXAMPLES / "compile_module.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    state = torch.get_rng_state()
    spec.loader.exec_module(made)
    yield made
    torch.set_rng_state(state)


def test_the_python_example_runs_and_says_what_it_wrote(
    compile_module: ModuleType, in_tmp: Path, checked_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_module.main()
    said = capsys.readouterr().out
    assert "relative error on the samples: 0.0" in said
    assert "# factorize @ up" in said
    assert "'program.pt2'" in said
    assert said.endswith("wrote model.onnx\n")
    assert list(in_tmp.iterdir()) == []


def test_the_example_spec_is_valid_for_the_packaged_encoder(minilm: Path, cli: tiny.Run) -> None:
    assert minilm.is_dir()
    made = cli("validate", EXAMPLES / "minilm.yaml", "--json")
    assert (made.code, made.json) == (0, {"valid": True, "passes": ["factorize"], "sites": 36})


def test_the_example_spec_has_its_data_beside_it() -> None:
    spec = yaml.safe_load((EXAMPLES / "minilm.yaml").read_text())
    for section in ("calibration", "evaluate"):
        assert (EXAMPLES / spec[section]["dataset"]).is_file()
