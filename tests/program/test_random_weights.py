"""Models that start from random weights: from a config alone, and modules by the rules of their own parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from torch import Tensor, nn

import lrc
from lrc.errors import LrcError, ModelError, UsageError
from lrc.program.random_init import model_of_config, renewed

RANDOM = {"version": 1, "model": {"init": "random"}}


@pytest.fixture
def config_alone(llama: Path, tmp_path: Path) -> Path:
    """A folder with a config and a tokenizer and no weights; the config says how wide the weights start."""
    folder = tiny.copy_of(llama, tmp_path / "config")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.05}))
    return folder


def start(folder: Path, **model: Any) -> dict[str, Tensor]:
    document = {"version": 1, "model": {"init": "random", **model}}
    return lrc.compile(str(folder), document).program.tensors()


def test_a_config_alone_gives_the_start_that_its_class_makes_and_a_seed_repeats_it(config_alone: Path) -> None:
    found = start(config_alone)
    weight = found["model.layers.0.mlp.gate_proj.weight"]
    assert weight.dtype == torch.float32
    assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert bool((found["model.norm.weight"] == 1).all())
    again, _ = model_of_config(config_alone, seed=0)
    assert all(torch.equal(value, found[name]) for name, value in again.state_dict().items() if name in found)
    other = start(config_alone, init={"type": "random", "seed": 1}, dtype="bfloat16")["model.layers.0.mlp.gate_proj.weight"]
    assert other.dtype == torch.bfloat16
    assert not torch.equal(weight.to(torch.bfloat16), other)


def test_a_folder_with_weights_starts_as_one_without_them(llama: Path, config_alone: Path, tmp_path: Path) -> None:
    whole = tiny.copy_of(llama, tmp_path / "whole")
    (whole / "config.json").write_text((config_alone / "config.json").read_text())
    one, other = (model_of_config(folder, seed=0)[0].state_dict() for folder in (whole, config_alone))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_global_random_numbers_stay_where_they_were(config_alone: Path) -> None:
    module = tiny.mlp()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model_of_config(config_alone, seed=0)
    renewed(module, 5)
    assert torch.equal(torch.rand(2), expected)


def test_a_small_decoder_is_pretrained_from_a_spec_and_its_folder_generates(
    config_alone: Path, data: Path, cli: tiny.Run, tmp_path: Path
) -> None:
    spec = {
        "version": 1,
        "model": {"path": str(config_alone), "init": "random"},
        "passes": [
            {
                "type": "train", "data": {"dataset": str(data / "stream.txt"), "max_length": 12}, "objective": "causal_lm",
                "parameters": "all", "optimizer": {"type": "adamw", "lr": 0.01}, "steps": 40, "batch_size": 8,
            }
        ],
        "evaluate": {"metrics": ["perplexity"], "dataset": str(data / "stream.txt"), "max_length": 12},
        "export": [{"format": "hf"}],
    }  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    answer = cli("compile", "spec.yaml", "-o", "out", "--json")
    assert answer.code == 0, answer.err
    (row,) = answer.json["metrics"]
    assert row["value"] < 0.7 * row["original"]
    model = lrc.load(tmp_path / "out")
    made = model.generate(torch.tensor([[2, 5]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]  # transformers
    assert made.shape == (1, 5)


class Nested(nn.Module):
    """Parts with rules inside of parts with rules, and statistics that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.attention(x, x, x)[0])
        return y


def test_a_module_runs_its_own_rules_again_and_the_given_one_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    module = Nested()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(7)
    made = renewed(module, 1)
    assert all(bool((t == 7).all()) for t in module.state_dict().values())
    assert bool((made.attention.out_proj.bias == 0).all())  # as the whole wants it, not as its part would
    assert bool((made.norm.running_mean == 0).all())
    weight = made.attention.in_proj_weight
    assert float(weight.detach().abs().max()) <= (6 / (24 + 8)) ** 0.5
    assert torch.equal(weight, renewed(module, 1).attention.in_proj_weight)
    assert not torch.equal(weight, renewed(module, 2).attention.in_proj_weight)


def test_a_transformers_module_is_made_anew_from_its_config(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    made = renewed(model, 0).state_dict()
    assert float(made["model.layers.0.mlp.up_proj.weight"].std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    assert bool((made["model.norm.weight"] == 1).all())
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    assert {t.dtype for t in renewed(model.half(), 0).state_dict().values()} == {torch.float16}


class Bare(nn.Module):
    """A parameter of its own and no rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inner.scale  # type: ignore[no-any-return]  # a tensor


def test_what_has_no_rule_for_its_start_is_refused_by_name(config_alone: Path, tmp_path: Path) -> None:
    x = {"x": torch.ones(2, 3)}
    with pytest.raises(ModelError, match=r"inner: Module has parameters of its own and no `reset_parameters`"):
        lrc.compile(Bare(), RANDOM, inputs=x)
    for captured in (lrc.capture(Bare(), x), torch.export.export(Bare(), (), kwargs=x)):
        with pytest.raises(UsageError, match="no rule that says how its weights start"):
            lrc.compile(captured, RANDOM)
    torch.export.save(torch.export.export(Bare(), (), kwargs=x), tmp_path / "bare.pt2")
    with pytest.raises(UsageError, match="no rule that says how its weights start"):
        lrc.compile(str(tmp_path / "bare.pt2"), RANDOM)
    both = {"version": 1, "model": {"init": "random", "weights": "some.safetensors"}}
    with pytest.raises(UsageError, match="random weights are asked for too"):
        lrc.compile("tiny:mlp_with_inputs", both, allow_code=True)
    (config_alone / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelError, match="transformers cannot load the folder"):
        start(config_alone)
    (config_alone / "config.json").write_text('{"model_type": "lrc_llama"}')
    with pytest.raises(UsageError, match="a model that lrc has changed"):
        start(config_alone)
    with pytest.raises(LrcError, match=r"model\.init"):
        lrc.compile(str(config_alone), {"version": 1, "model": {"init": "zeros"}})
