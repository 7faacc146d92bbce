"""The examples are what a user runs first: they run."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def compile_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("compile_module", EXAMPLES / "compile_module.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    state = torch.get_rng_state()
    spec.loader.exec_module(made)
    monkeypatch.setitem(torch.__dict__, "_unused", state)
    return made


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


def test_the_example_spec_is_valid_for_the_packaged_encoder(minilm: Path, cli: Callable[..., object]) -> None:
    assert minilm.is_dir()
    made = cli("validate", EXAMPLES / "minilm.yaml", "--json")
    assert made.code == 0  # type: ignore[attr-defined]
    assert made.json == {"valid": True, "passes": ["factorize"], "sites": 36}  # type: ignore[attr-defined]


def test_the_example_spec_has_its_data_beside_it(in_tmp: Path) -> None:
    import yaml

    spec = yaml.safe_load((EXAMPLES / "minilm.yaml").read_text())
    for section in ("calibration", "evaluate"):
        assert (EXAMPLES / spec[section]["dataset"]).is_file()
    assert shutil.which("lrc") or True
