"""Adapters through every way out: the HF folder, ONNX, pt2, graft; merged in two precisions."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import lrc
from lrc.api import compile_to_folder
from lrc.errors import UsageError
from lrc.lower.aoti import AotiExport, export_aoti, open_aoti
from lrc.lower.inductor import compiler
from lrc.maps import Dense

METHODS: list[dict[str, Any]] = [
    {"method": "lora"}, {"method": "rslora", "init": "pissa"}, {"method": "dora"}, {"method": "vera", "rank": 6},
]  # fmt: skip
IDS = [options["method"] for options in METHODS]


@pytest.mark.slow
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


def moved(options: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Any:
    """A tiny model with adapters that do something."""
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", "rank": 3} | options]}, inputs=inputs)
    with torch.no_grad():
        for parameter in made.program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="skipped: Inductor needs a C++ compiler (g++ or clang++)")
@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_unmerged_adapters_are_compiled_by_inductor_ahead_and_just_in_time(options: dict[str, Any], tmp_path: Path) -> None:
    made = moved(options, {"x": tiny.mlp_inputs()})
    x = tiny.mlp_inputs(3, seed=8)
    with torch.no_grad():
        expected = made.module(x=x)
        runner = open_aoti(tmp_path / export_aoti(made.program, tmp_path, AotiExport()).artifact)
        allowed = 1e-5 * float(expected.abs().max())
        assert float((runner(x=x)["output"] - expected).abs().max()) <= allowed
        compiled = torch.compile(made.module, fullgraph=True)
        assert float((compiled(x=x) - expected).abs().max()) <= allowed
    assert not torch.allclose(expected, tiny.mlp()(x), atol=1e-3)


def test_lora_on_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="skipped: the comparison with PEFT needs peft")
    inputs = {"x": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))}
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 3, 1))
    made = lrc.compile(model, {"version": 1, "passes": [{"type": "adapt", "rank": 2}]}, inputs={"input": inputs["x"]})
    kept = {d.sites[0]: d.keep for d in made.plan.decisions}
    assert kept == {"0": "a convolution in 2 groups, each of which sees channels of its own", "1": None}
    with pytest.warns(UserWarning, match="Merging is not supported"):
        theirs = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a convolution in groups, whose adapter in PEFT reads the channels of all groups"):
        lrc.compile(
            model, {"version": 1, "passes": [{"type": "load_adapter", "path": str(tmp_path)}]}, inputs={"input": inputs["x"]}
        )
