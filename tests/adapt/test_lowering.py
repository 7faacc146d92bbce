"""Adapters through every way out: the HF folder, ONNX, pt2, graft; merged in two precisions."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.api import compile_to_folder
from lrc.maps import Dense

METHODS: list[dict[str, Any]] = [
    {"method": "lora"}, {"method": "rslora", "init": "pissa"}, {"method": "dora"}, {"method": "vera", "rank": 6},
]  # fmt: skip
IDS = [options["method"] for options in METHODS]


@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_a_folder_with_adapters_is_checked_and_reloads(
    options: dict[str, Any], llama: Path, tmp_path: Path, checked_here: None
) -> None:
    passes = [{"type": "adapt", "targets": ["layers:[0-9]"], "rank": 2} | options]
    spec = {"version": 1, "passes": passes, "export": ["hf", {"format": "peft"}, "onnx"]}
    done = compile_to_folder(lrc.capture(str(llama)), spec, output=tmp_path / "out")
    done.raise_on_failure()
    assert {row["format"] for row in done.record.parity} == {"hf", "onnx"}
    assert all(row["ok"] for row in done.record.parity)
    assert (tmp_path / "out" / "adapters" / "default" / "adapter_model.safetensors").is_file()
    model = lrc.load(tmp_path / "out")
    trained = [name for name, p in model.named_parameters() if "adapter" in name]
    assert trained
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model.generate(ids, max_new_tokens=3)[:, :8], ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_merging_is_exact_to_rounding(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny.mlp().to(dtype)
    x = tiny.mlp_inputs().to(dtype)
    made = lrc.compile(model, {"version": 1, "passes": [{"type": "adapt", "rank": 3} | options]}, inputs={"x": x})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype))
    before = {name: m.exact() for name, m in made.program.maps.items()}
    merged = lrc.compile(made.program, {"version": 1, "passes": [{"type": "merge"}]}, inputs={"x": x})
    for name, (weight, bias) in before.items():
        held = merged.program.maps[name]
        assert isinstance(held, Dense)
        assert torch.equal(held.weight.detach(), weight.to(dtype))
        assert (held.bias is None) == (bias is None)


@pytest.mark.parametrize(("options", "numbers"), [
    ({"method": "lora", "rank": 4}, lambda m, n: 4 * (m + n)),
    ({"method": "dora", "rank": 4}, lambda m, n: 4 * (m + n) + m),
    ({"method": "vera", "rank": 6}, lambda m, n: m + 6),
], ids=["lora", "dora", "vera"])  # fmt: skip
def test_the_trained_numbers_are_those_of_the_papers(options: dict[str, Any], numbers: Any) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", **options}]}, inputs={"x": tiny.mlp_inputs()})
    trained = sum(p.numel() for p in made.program.graph_module.parameters() if p.requires_grad)
    assert trained == sum(numbers(*made.program.sites[name].shape) for name in made.program.maps)


def test_the_rows_of_dora_have_the_lengths_of_its_magnitudes() -> None:
    passes = [{"type": "adapt", "method": "dora", "rank": 3}]
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": passes}, inputs={"x": tiny.mlp_inputs()})
    for name, held in made.program.maps.items():
        original = tiny.mlp().get_submodule(name).weight
        assert torch.allclose(held.magnitude, original.norm(dim=1))
        with torch.no_grad():
            held.magnitude.mul_(1.5)
            held.inner.adapter.inner.B.add_(0.3)
        assert torch.allclose(held.exact().weight.norm(dim=1).float(), held.magnitude, atol=1e-5)


def test_the_norm_of_dora_is_a_constant_in_the_backward_pass() -> None:
    made = lrc.compile(
        tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", "method": "dora", "rank": 3, "targets": ["up"]}]},
        inputs={"x": tiny.mlp_inputs()},
    )  # fmt: skip
    held = made.program.maps["up"]
    x = tiny.mlp_inputs()
    sent = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    held(x).backward(sent)
    factor = held.magnitude / made.program.sites["up"].map.exact().weight.float().norm(dim=1)
    gradient = held.inner.adapter.scale * (factor * sent).T @ (x @ held.inner.adapter.inner.A.T)
    assert torch.allclose(held.inner.adapter.inner.B.grad, gradient, atol=1e-4)


def test_a_tied_head_stays_as_it_is_unless_asked(gpt2: Path) -> None:
    spec = {"version": 1, "passes": [{"type": "adapt", "targets": ["**", "lm_head"], "rank": 2}]}
    made = lrc.compile(str(gpt2), spec)
    assert any("tied" in (d.keep or "") for d in made.plan.decisions)
    spec["passes"][0]["tied"] = "untie"  # type: ignore[index]
    untied = lrc.compile(str(gpt2), spec)
    assert len(untied.program.maps) > len(made.program.maps)
    ids = torch.arange(4, 12)[None]
    before = lrc.compile(str(gpt2), {"version": 1, "passes": []}).module(input_ids=ids, attention_mask=torch.ones_like(ids))
    after = untied.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(
        before[0] if isinstance(before, tuple) else before.logits, after[0] if isinstance(after, tuple) else after.logits
    )
