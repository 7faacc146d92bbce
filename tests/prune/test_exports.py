"""Pruned models in their files: folders, ONNX with and without a cache, and programs say what the pruned model says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from models import Captured
from nets import Attending, net

import lrc
from lrc.api import compile_to_folder
from lrc.lower.hf_folder import HfExport, export_hf, load_model
from lrc.lower.ort import OrtRunner
from lrc.lower.ort_decoder import OnnxDecoder
from lrc.lower.stock_sizes import fitting_configs, shapes_of, uneven_layers
from lrc.program.graft import graft

WITHIN = 1e-5


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


def halved(**method: Any) -> dict[str, Any]:
    """A spec that prunes the blocks to half of their width."""
    method = {"type": "structured", "amount": {"width_kept": 0.5}, **method}
    return {"version": 1, "passes": [{"type": "prune", "targets": [tiny.LAYERS], "method": method}]}


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def stored(source: Path, **method: Any) -> tuple[lrc.Compiled, Path, str]:
    """Prune, write a folder, hold what it loads to the program in memory; return both, and the note."""
    done = lrc.compile(str(source), halved(**method), cache=Path("cache"))
    written = export_hf(done.program, Path("out"), HfExport())
    inputs = dict(done.program.inputs.examples)
    with torch.no_grad():
        found, expected = load_model(Path("out"))(**inputs), done.program(**inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=WITHIN)
    return done, Path("out"), " ".join(written.notes)


def said(answer: Any) -> torch.Tensor:
    """Return the only tensor of an answer."""
    found: torch.Tensor = answer["output"] if isinstance(answer, dict) else answer
    return found


def run_whole(source: Path, decodes: bool) -> None:
    """Compile with both exports, each of which is checked at two shapes; hold greedy tokens to those of the grafted model."""
    spec = {**halved(), "export": [{"format": "hf"}, {"format": "onnx"}]}
    done = compile_to_folder(str(source), spec, output=Path("out"), cache=Path("cache"))
    done.raise_on_failure()
    assert {row["format"] for row in done.record.parity} == {"hf", "onnx"}
    assert all(row["ok"] for row in done.record.parity)
    if not decodes:
        return
    program = lrc.compile(str(source), halved(), cache=Path("cache")).program
    model: Any = graft(program).eval()
    ids = torch.tensor([[5, 9, 13, 21], [7, 7, 30, 4]])
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = ids  # greedy tokens of the graph alone, without a cache
    with torch.no_grad():
        for _ in range(10):
            logits = program(input_ids=free, attention_mask=torch.ones_like(free))["logits"]
            free = torch.cat([free, logits[:, -1:].argmax(-1)], 1)
    for made in (model, load_model(Path("out"))):
        assert torch.equal(made.generate(**given, **settings, use_cache=True), free)
    np.testing.assert_array_equal(OnnxDecoder(Path("out/onnx/model.onnx")).generate(**given, max_new_tokens=10), free.numpy())


@pytest.mark.slow
def test_a_pruned_llama_runs_in_every_form_and_says_the_same_tokens(llama: Path, checked_here: None) -> None:
    run_whole(llama, decodes=True)
    config = read(Path("out"))
    assert config["model_type"] == "llama"
    assert "lrc" not in config


@pytest.mark.slow
def test_a_pruned_gpt2_runs_in_every_form_and_says_the_same_tokens(gpt2: Path, checked_here: None) -> None:
    run_whole(gpt2, decodes=True)


@pytest.mark.slow
def test_a_pruned_encoder_runs_in_every_form(bert: Path, checked_here: None) -> None:
    run_whole(bert, decodes=False)


def test_equal_widths_are_a_stock_model_that_transformers_loads_by_itself(llama: Path) -> None:
    """Half of the heads, not heads of half the size, though the weights have the same shapes either way."""
    import transformers

    done, folder, note = stored(llama)
    before, config = read(llama), read(folder)
    changed = {key: value for key, value in config.items() if before.get(key) != value and key != "_name_or_path"}
    assert changed == {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert note.startswith("a stock model of other sizes: intermediate_size 48 → 24, num_attention_heads 4 → 2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is transformers.LlamaForCausalLM
    inputs = dict(done.program.inputs.examples)
    with torch.no_grad():
        found, expected = model.eval()(**inputs).logits, done.program(**inputs)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=WITHIN)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "n_inner", 32),
        pytest.param("bert", "intermediate_size", 12, marks=pytest.mark.slow),
        pytest.param("opt", "ffn_dim", 12, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_features_is_found_in_any_config(
    name: str, key: str, value: int, captured: Callable[[str], Captured]
) -> None:
    _, folder, note = stored(captured(name).folder, kinds=["features"])
    assert f"{key} " in note
    config = read(folder)
    assert (config["model_type"], config[key]) == (name, value)


def test_heads_that_no_config_can_say_leave_a_folder_of_ours_with_the_reason(captured: Callable[[str], Captured]) -> None:
    _, folder, note = stored(captured("bert").folder)
    assert read(folder)["model_type"] == "lrc_bert"
    assert "the folder needs lrc to load: none of the integers of its config gives its class these sizes" in note


def test_a_tensor_that_differs_between_layers_is_named() -> None:
    old = {"h.0.up": (8, 4), "h.1.up": (8, 4), "head": (9, 4)}
    assert uneven_layers(old, {**old, "h.0.up": (6, 4), "h.1.up": (6, 4)}) is None
    assert uneven_layers(old, {**old, "h.0.up": (6, 4), "h.1.up": (5, 4)}) == "h.1.up"


@pytest.mark.slow
def test_layers_of_different_widths_leave_a_folder_of_ours_with_the_reason(tmp_path: Path) -> None:
    source = tiny.write_llama(tmp_path / "model", num_hidden_layers=2)
    _, folder, note = stored(source, allocate="global", amount={"params_kept": 0.6})
    assert read(folder)["model_type"] == "lrc_llama"
    assert "is not as large in every layer" in note


def test_every_config_of_these_shapes_is_tried(captured: Callable[[str], Captured]) -> None:
    """Fewer heads and smaller heads give the same shapes; outputs tell which it is."""
    model: Any = captured("llama").model
    old = shapes_of(model)
    new = {
        name: tuple(n // 2 if (name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and i == 0)
                    or (name.endswith("o_proj.weight") and i == 1) else n for i, n in enumerate(shape))
        for name, shape in old.items()
    }  # fmt: skip
    found = [{k: c.to_dict()[k] for k in ("head_dim", "num_attention_heads", "num_key_value_heads")}
             for c in fitting_configs(model, old, new)]  # fmt: skip
    assert {"head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1} in found
    assert {"head_dim": 2, "num_attention_heads": 4, "num_key_value_heads": 2} in found


@pytest.mark.parametrize("kind", ["attention", "grouped"])
def test_heads_within_the_batch_and_groups_of_norms_run_as_onnx(kind: str) -> None:
    torch.manual_seed(0)
    model = Attending(batch_first=True) if kind == "attention" else net(kind)
    x = torch.randn(3, 6, 20) if kind == "attention" else torch.randn(3, 3, 8, 8)
    step = {"type": "prune", "method": {"type": "structured", "amount": {"width_kept": 0.5}}}
    done = lrc.compile(model.eval(), {"version": 1, "passes": [step]}, inputs=[x])
    assert any("of 4 heads" in note or "of 4 channels" in note for d in done.plan.decisions for note in d.notes)
    more = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        expected = done.module(more)
        torch.testing.assert_close(done.graft()(more), expected, rtol=0, atol=WITHIN)
    found = OrtRunner(done.to_onnx(Path("model.onnx")))(**{next(iter(done.program.inputs.examples)): more})["output"]
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=WITHIN)


def test_a_pruned_network_with_batch_norms_runs_as_onnx_and_as_a_stored_program() -> None:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    method = {"type": "structured", "amount": {"width_kept": 0.5}}
    spec = {"version": 1, "passes": [{"type": "prune", "method": method}], "export": [{"format": "pt2"}, {"format": "onnx"}]}
    done = lrc.compile(net("residual"), spec, inputs=[x], cache=Path("cache"))
    name = next(iter(done.program.inputs.examples))
    images = torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = done.module(images)
        again = lrc.load(done.save(Path("saved")))
        torch.testing.assert_close(said(again(**{name: images})), expected, rtol=0, atol=WITHIN)
    found = OrtRunner(done.to_onnx(Path("model.onnx")))(**{name: images})["output"]
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=WITHIN)
