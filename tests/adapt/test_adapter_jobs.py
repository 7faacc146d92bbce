"""`lrc merge` and `lrc extract-lora`, and what several adapters become together."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lrc_passes.adapters.plp import made as put_together
from safetensors.torch import load_file, save_file
from torch import Tensor

import lrc
from lrc.errors import LrcError
from lrc.lower.peft_export import PeftExport, peft_folder
from lrc.program import Program
from lrc.run.adapter_jobs import Combination, extract_lora, merge_adapters
from lrc.solvers.combine import agreed, combine, dropped, trimmed


def adapter(model: Program, folder: Path, seed: int, **options: Any) -> Path:
    """Write an adapter with random numbers, as if it had been trained."""
    options = {"rank": 2, "targets": ["**.q_proj", "**.down_proj"]} | options
    made = lrc.compile(model, {"version": 1, "passes": [{"type": "adapt", **options}]})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft_folder(made.program, PeftExport())[0].save(folder)
    return folder


def change_of(folder: Path, key: str) -> Tensor:
    config = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    A, B = (held[f"base_model.model.{key}.lora_{f}.weight"].double() for f in "AB")
    return config["lora_alpha"] / config["r"] * B @ A


KEY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(llama: Path) -> Program:
    return lrc.capture(str(llama))


@pytest.fixture(scope="module")
def two(base: Program, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [adapter(base.clone(), tmp_path_factory.mktemp("adapter"), seed, rank=2 + seed) for seed in (0, 1)]


def test_a_merged_model_is_a_stock_folder_with_the_sum_of_the_changes(
    base: Program, llama: Path, two: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    merge_adapters(base.clone(), two, out, Combination(weights=(0.5, 2.0)))
    assert "lrc" not in json.loads((out / "config.json").read_text())
    merged, before = (AutoModelForCausalLM.from_pretrained(folder).get_submodule(KEY).weight for folder in (out, llama))
    expected = 0.5 * change_of(two[0], KEY) + 2 * change_of(two[1], KEY)
    assert torch.allclose((merged - before).double(), expected, atol=1e-5)


def test_adapters_side_by_side_are_their_weighted_sum_exactly_and_svd_is_the_closest(
    base: Program, two: list[Path], tmp_path: Path
) -> None:
    cat, svd = tmp_path / "cat", tmp_path / "svd"
    merge_adapters(base.clone(), two, cat, Combination("cat", (1.0, -1.0)), as_adapter=True)
    expected = change_of(two[0], KEY) - change_of(two[1], KEY)
    assert torch.allclose(change_of(cat, KEY), expected, atol=1e-6)
    assert json.loads((cat / "adapter_config.json").read_text())["r"] == 5
    done = merge_adapters(base.clone(), two, svd, Combination("svd", (1.0, -1.0), rank=3), as_adapter=True)
    error = float((change_of(svd, KEY) - expected).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(expected)[3:].norm()), rel=1e-4)
    assert done["errors"][KEY] == pytest.approx(error / float(expected.norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties"])
def test_every_way_of_combining_makes_a_model(method: Any, base: Program, two: list[Path], tmp_path: Path) -> None:
    merge_adapters(base.clone(), two, tmp_path / "out", Combination(method, density=0.4))
    ids = torch.arange(4, 12)[None]
    assert bool(torch.isfinite(lrc.load(tmp_path / "out")(input_ids=ids).logits).all())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Combination("svd"), "needs a rank"),
        (Combination(weights=(1.0,)), "one for each adapter"),
        (Combination("best"), "expected one of linear"),  # type: ignore[arg-type]
        (Combination(density=0.0), "in \\(0, 1\\]"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    how: Combination, words: str, base: Program, two: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(LrcError, match=words):
        merge_adapters(base.clone(), two, tmp_path / "out", how)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(bert: Path, two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(LrcError, match="no site of the model"):
        merge_adapters(lrc.capture(str(bert)), two, tmp_path / "out", Combination())


def test_what_fine_tuning_changed_comes_back_as_an_adapter(base: Program, llama: Path, tmp_path: Path) -> None:
    tuned = tiny.copy_of(llama, tmp_path / "tuned")
    held = load_file(tuned / "model.safetensors")
    change = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).T @ torch.randn(
        3, 32, generator=torch.Generator().manual_seed(1)
    )
    held[f"{KEY}.weight"] = held[f"{KEY}.weight"] + 0.1 * change
    held["model.norm.weight"] = held["model.norm.weight"] + 0.5
    save_file(held, tuned / "model.safetensors", metadata={"format": "pt"})
    after = lrc.capture(str(tuned))
    done = extract_lora(base.clone(), after, tmp_path / "out", 3)
    assert list(done["errors"]) == [KEY]
    assert done["errors"][KEY] < 1e-5
    assert done["not_in_the_adapter"] == ["model.norm.weight"]
    assert torch.allclose(change_of(tmp_path / "out", KEY), 0.1 * change.double(), atol=1e-5)
    lossy = extract_lora(base.clone(), after, tmp_path / "lossy", 1)
    S = torch.linalg.svdvals(change.double())
    assert lossy["errors"][KEY] == pytest.approx(float(S[1:].norm() / S.norm()), rel=1e-3)


def test_both_are_commands(llama: Path, two: list[Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lrc.cli import app

    merged = CliRunner().invoke(app, ["merge", str(llama), *map(str, two), "-o", str(tmp_path / "m"), "--json"])
    assert merged.exit_code == 0, merged.output
    assert json.loads(merged.stdout)["adapters"] == 2
    words = ["extract-lora", str(llama), str(tmp_path / "m"), "-o", str(tmp_path / "x"), "--rank", "5"]
    extracted = CliRunner().invoke(app, words)
    assert extracted.exit_code == 0, extracted.output
    assert KEY in extracted.stdout
    expected = sum(change_of(folder, KEY) for folder in two)
    assert torch.allclose(change_of(tmp_path / "x", KEY), torch.as_tensor(expected), atol=1e-5)


def test_two_models_that_are_not_one_architecture_are_refused(base: Program, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LrcError, match="one architecture"):
        extract_lora(base.clone(), lrc.capture(str(bert)), tmp_path / "out", 3)
    with pytest.raises(LrcError, match="nothing to extract"):
        extract_lora(base.clone(), base.clone(), tmp_path / "out", 3)


def saved(program: Program, folder: Path) -> Path:
    peft_folder(program, PeftExport())[0].save(folder)
    return folder


def test_halves_that_were_learnt_apart_are_put_together_as_the_method_itself_does(tmp_path: Path) -> None:
    """Break, train apart, make: the folders of a style and a content adapter become one, in files as in memory."""
    x = {"input": torch.randn(2, 12)}
    programs = []
    for seed, train in ((1, "up"), (2, "down")):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 7))
        passes = [{"type": "adapt", "method": {"type": "plp", "train": train}, "rank": 3}]
        made = lrc.compile(model, {"version": 1, "passes": passes}, inputs=x)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.program.graph_module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        programs.append(made.program)
    folders = [saved(program, tmp_path / str(i)) for i, program in enumerate(programs)]
    captured = lrc.capture(model, x)
    merge_adapters(captured.clone(), folders, tmp_path / "out", Combination("factor_swap"), as_adapter=True)
    style, content = programs
    for name in ("0", "1"):
        expected = (
            put_together(style.maps[name], content.maps[name]).exact().weight - style.originals[f"{name}.weight"].double()
        )
        assert torch.allclose(change_of(tmp_path / "out", name), expected, atol=1e-6)
    merge_adapters(captured.clone(), [folders[0]] * 2, tmp_path / "same", Combination("factor_swap"), as_adapter=True)
    assert torch.allclose(change_of(tmp_path / "same", "0"), change_of(folders[0], "0"), atol=1e-7)
    with pytest.raises(LrcError, match="two adapters, style and content"):
        merge_adapters(captured.clone(), folders[:1], tmp_path / "one", Combination("factor_swap"), as_adapter=True)


def test_biases_that_adapters_trained_are_merged_too(tmp_path: Path) -> None:
    model, x = tiny.mlp(), {"x": tiny.mlp_inputs()}
    made = lrc.compile(model, {"version": 1, "passes": [{"type": "adapt", "method": "colora", "rank": 2}]}, inputs=x)
    with torch.no_grad():
        for parameter in made.program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    folder = saved(made.program, tmp_path / "a")
    program = lrc.capture(model, x)
    with pytest.raises(LrcError, match="a trained bias stands beside an adapter"):
        merge_adapters(program.clone(), [folder], tmp_path / "c", Combination("cat"), as_adapter=True)
    merge_adapters(program, [folder], tmp_path / "out", Combination())
    assert torch.allclose(program.module()(**x), made.module(**x), atol=1e-5)
    assert repr(program.maps["up"]) == "Dense[20,12]"


def test_ties_combines_changes_as_peft_does() -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils", reason="skipped: the comparison with PEFT needs peft")
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    weights = [0.5, 1.0, 2.0]
    for density in (0.3, 0.5, 0.9):
        ours = combine(changes, weights, "ties", density, generator)
        expected = theirs.ties(changes, torch.tensor(weights), density)
        assert torch.allclose(ours, expected, atol=1e-6)


def test_ties_keeps_the_large_entries_that_agree() -> None:
    a, b = torch.tensor([[4.0, -1.0, 3.0, 0.1]]), torch.tensor([[2.0, 5.0, -1.0, 0.2]])
    assert torch.equal(trimmed(a, 0.5), torch.tensor([[4.0, 0.0, 3.0, 0.0]]))
    assert torch.equal(agreed([a, b], [1.0, 1.0]), torch.tensor([[3.0, 5.0, 3.0, (0.1 + 0.2) / 2]]))
    made = combine([a, b], [1.0, 1.0], "ties", 0.5, torch.Generator())
    assert torch.equal(made, torch.tensor([[3.0, 5.0, 3.0, 0.0]]))


def test_dare_keeps_the_mean() -> None:
    change = torch.ones(200, 200)
    made = dropped(change, 0.25, torch.Generator().manual_seed(0))
    assert set(made.unique().tolist()) == {0.0, 4.0}
    assert float(made.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(dropped(change, 1.0, torch.Generator()), change)
