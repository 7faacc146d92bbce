"""Folders for PEFT of what PEFT has no method for, of starts that look at data, and of trained biases."""

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import Case, adapted, case, distance, train
from safetensors.torch import load_file, save_file
from torch import nn

import lrc
from lrc.api import Compiled
from lrc.errors import LrcError
from lrc.lower.peft_export import PeftExport, export_peft
from lrc.maps import Gate

peft = pytest.importorskip("peft", reason="skipped: comparisons with PEFT, which is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = ("lora_A.weight", "lora_B.weight", "base_layer.bias")
LINEARS = ["{tall,square,wide,row,column}"]
AS_LORA: dict[str, dict[str, Any]] = {
    "lora_xs": {"method": "lora_xs", "rank": 1, "init": {"type": "svd_weight", "core_std": 0.5}},
    "loldu": {"method": "loldu", "rank": 1},
    "sora": {"method": "sora", "rank": 3},
    "flora": {"method": "flora", "rank": 3, "targets": LINEARS},
    "colora": {"method": "colora", "rank": 2},
    "plp": {"method": "plp", "rank": 4},
    "plp from the base": {"method": {"type": "plp", "zero_init": True}, "rank": 4},
    "hydra beside": {"method": {"type": "hydra", "sequential": 0, "branch_bias": False}, "rank": 2},
    "hydra": {"method": {"type": "hydra", "sequential": 3, "branch_bias": False}, "rank": 2, "alpha": 3.0},
    "hydra with a trained scale": {
        "method": {"type": "hydra", "sequential": 0, "branch_bias": False, "train_scale": True}, "rank": 2, "alpha": 3.0
    },
    "loldu with a trained scale": {"method": {"type": "loldu", "train_scale": True}, "rank": 1, "alpha": 0.5},
    "hydra after": {"method": {"type": "hydra", "sequential": 2, "parallel": False, "branch_bias": False}, "rank": 2},
    "hydra with biases": {
        "method": {"type": "hydra", "sequential": 2}, "rank": 3, "alpha": 2.0, "targets": ["{conv,tall,square,row,column}"]
    },
}  # fmt: skip


def plain() -> Case:
    """The sites of `case` without the dilation that PEFT cannot load."""
    it = case()
    it.model.conv = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1)
    return it


def exported(made: Compiled, folder: Path) -> Path:
    """Write the adapters of a program; returns the PEFT folder."""
    export_peft(made.program, folder, PeftExport(version=peft.__version__))
    return folder / "adapters" / "default"


def in_peft(folder: Path, it: Case) -> Any:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(it.model), folder).eval()  # PEFT changes its model
    return model(**it.inputs)


def loaded(folder: Path, it: Case) -> Compiled:
    spec = {"version": 1, "passes": [{"type": "load_adapter", "path": str(folder)}]}
    return lrc.compile(it.model, spec, inputs=it.inputs)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", AS_LORA)
def test_a_method_that_is_a_lora_gives_the_same_outputs_in_peft(name: str, tmp_path: Path) -> None:
    it = plain()
    made = adapted(it, **AS_LORA[name])
    train(made.program)
    trained = made.module(**it.inputs)
    assert distance(trained, it.model(**it.inputs)) > 1e-3
    folder = exported(made, tmp_path)
    assert distance(loaded(folder, it).module(**it.inputs), trained) < 2e-6
    assert distance(in_peft(folder, it), trained) < 2e-6


def test_gates_that_are_closed_are_no_part_of_the_folder_and_a_module_without_any_left_goes(tmp_path: Path) -> None:
    it = plain()
    made = adapted(it, targets=LINEARS, method="sora", rank=4, alpha=12.0)
    train(made.program)
    gates = {name: next(p for p in m.modules() if isinstance(p, Gate)) for name, m in made.program.maps.items()}
    with torch.no_grad():
        gates["tall"].diagonal.zero_()
        gates["wide"].diagonal[[0, 3]] = 0
    folder = exported(made, tmp_path)
    config = config_of(folder)
    assert "tall" not in config["target_modules"]
    assert config["rank_pattern"] == {"wide": 2}
    assert config["alpha_pattern"] == {"wide": 6}  # so that alpha' / r' stays alpha / r
    assert distance(in_peft(folder, it), made.module(**it.inputs)) < 2e-6
    with torch.no_grad():
        for gate in gates.values():
            gate.diagonal.zero_()
    with pytest.raises(LrcError, match="every gate of every adapter is closed"):
        export_peft(made.program, tmp_path / "none", PeftExport())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "flora", "rank": 2, "targets": ["conv"]}, "conv: the adapter is no product of two matrices"),
        ({"method": {"type": "compacter", "n": 2}, "rank": 4, "targets": ["tall"]}, "PEFT has no adapter of the form Chain"),
    ],
    ids=["flora", "compacter"],
)
def test_what_is_no_lora_is_refused_with_the_remedy(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    it = plain()
    with pytest.raises(LrcError, match=words):
        export_peft(adapted(it, **options).program, tmp_path, PeftExport())
    assert not (tmp_path / "adapters").exists()


def test_the_branch_after_a_weight_is_a_lora_of_the_summed_rank_and_a_change_of_the_bias(tmp_path: Path) -> None:
    it = plain()
    made = adapted(it, targets=["{tall,conv}"], method={"type": "hydra", "sequential": 3}, rank=2, alpha=4.0)
    train(made.program)
    folder = exported(made, tmp_path)
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (5, 10, "lora_only")
    for fqn in ("tall", "conv"):
        weight, bias = made.program.maps[fqn].exact()
        named = {last: tensors[f"base_model.model.{fqn}.{last}"].double() for last in NAMES}
        change = 2.0 * named["lora_B.weight"].flatten(1) @ named["lora_A.weight"].flatten(1)
        own = getattr(it.model, fqn)
        assert torch.allclose(own.weight.flatten(1) + change, weight, rtol=0, atol=1e-6)
        assert torch.allclose(named["base_layer.bias"], bias, rtol=0, atol=1e-6)
        assert not torch.allclose(own.bias, named["base_layer.bias"].float())


def test_a_bias_that_branches_add_to_a_module_without_one_is_refused_once_it_is_not_zero(tmp_path: Path) -> None:
    it = plain()
    made = adapted(it, targets=["{wide,table}"], method={"type": "hydra", "sequential": 3}, rank=2)
    exported(made, tmp_path / "at the start")
    train(made.program)
    with pytest.raises(LrcError, match="the module has none: PEFT has no place for it"):
        export_peft(made.program, tmp_path, PeftExport())


def test_biases_that_peft_trained_are_read_and_written_byte_by_byte(tmp_path: Path) -> None:
    it = plain()
    targets = ["tall", "square", "row", "column", "conv"]
    theirs = peft.get_peft_model(plain().model, peft.LoraConfig(r=3, target_modules=targets, bias="all")).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_pretrained(tmp_path / "theirs")
    made = loaded(tmp_path / "theirs", it)
    assert distance(made.module(**it.inputs), theirs(**it.inputs)) < 2e-6
    assert made.program.maps["tall"].bias.requires_grad
    folder = exported(made, tmp_path)
    names = [f / "adapter_model.safetensors" for f in (folder, tmp_path / "theirs")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert config_of(folder)["bias"] == "all"
    other = peft.get_peft_model(plain().model, peft.LoraConfig(r=3, target_modules=["tall"], bias="all"))
    other.save_pretrained(tmp_path / "more")
    with pytest.raises(LrcError, match="its trained bias cannot be read: it has no adapter"):
        loaded(tmp_path / "more", it)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "lora_ga_hf"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_starts_that_look_at_data_hold_on_the_untouched_base_in_peft(method: str, init: str, tmp_path: Path) -> None:
    it = plain()
    passes = [{"type": "adapt", "targets": ["{tall,square,wide}"], "method": method, "rank": 2, "alpha": 4, "init": init}]
    made = lrc.compile(it.model, {"version": 1, "passes": passes}, inputs=it.inputs, calibration=[it.inputs] * 3)
    assert distance(made.module(**it.inputs), it.model(**it.inputs)) < 1e-5
    train(made.program)
    trained = made.module(**it.inputs)
    folder = exported(made, tmp_path)
    config = config_of(folder)
    assert config["r"] == 2 if init == "eva" else config["r"] == 4 or config["rank_pattern"]
    assert config["init_lora_weights"] is True
    for outputs in (in_peft(folder, it), loaded(folder, it).module(**it.inputs)):
        assert distance(outputs, trained) < 1e-5


@pytest.mark.parametrize("spelling", [".default_lora_latent_mapping.weight", "_lora_latent_mapping.weight"])
def test_the_checkpoint_of_the_authors_of_lora_xs_is_read_as_the_lora_that_it_is(spelling: str, tmp_path: Path) -> None:
    it = plain()
    made = adapted(it, targets=["tall"], method="lora_xs", rank=3, alpha=6)
    train(made.program)
    folder = exported(made, tmp_path)
    B, R, A = (part.detach() for part in made.program.maps["tall"].adapter.inner.slots)
    names = {"tall.lora_A.weight": A, "tall.lora_B.weight": B, f"tall{spelling}": R}
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in names.items()}, folder / "adapter_model.safetensors")
    assert distance(loaded(folder, it).module(**it.inputs), made.module(**it.inputs)) < 2e-6


def test_an_adapter_that_peft_started_by_eva_is_read(tmp_path: Path) -> None:
    it = plain()
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["tall", "square", "wide"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    theirs = peft.get_peft_model(plain().model, config).eval()
    peft.initialize_lora_eva_weights(
        theirs, [it.inputs] * 3, forward_fn=lambda m, x: m(**x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path)
    assert distance(loaded(tmp_path, it).module(**it.inputs), theirs(**it.inputs)) < 2e-6


@pytest.mark.parametrize(("bits", "iterations"), [(2, 1), (4, 1), (4, 3), (8, 2)])
def test_loftq_has_the_base_and_the_factors_of_peft(bits: int, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import loftq_utils

    if not hasattr(loftq_utils, "NFQuantizer"):
        pytest.skip("skipped: this version of PEFT quantises with bitsandbytes alone")
    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: True)  # imported, and not used on a processor
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)).eval()
    it = Case(model, {"input": torch.randn(3, 64)})
    made = adapted(it, targets=["**"], rank=4, alpha=4, init={"type": "loftq", "bits": bits, "iterations": iterations})
    for name, held in made.program.maps.items():
        weight = model.get_submodule(name).weight
        base, A, B = loftq_utils.loftq_init(weight, num_bits=bits, reduced_rank=4, num_iter=iterations)
        assert torch.allclose(held.base, base, atol=1e-6)
        assert torch.allclose(held.adapter.inner.B @ held.adapter.inner.A, B @ A, atol=1e-5)
        x = torch.randn(5, weight.shape[1])
        assert torch.allclose(held(x), x @ (base + B @ A).T + model.get_submodule(name).bias, atol=1e-4)


def test_random_starts_are_drawn_as_in_peft() -> None:
    """Uniform within the same bound, or normal with the same deviation; tables start the other way round."""
    it = Case(nn.Sequential(nn.Embedding(50, 300), nn.Linear(300, 200)), {"input": torch.arange(50)[None]})
    for init, word in (("kaiming", True), ("gaussian", "gaussian"), ("random", False), ("orthogonal", "orthogonal")):
        made = adapted(it, targets=["{0,1}"], rank=16, init=init)
        model = nn.Sequential(nn.Embedding(50, 300), nn.Linear(300, 200))
        config = peft.LoraConfig(r=16, target_modules=["0", "1"] if word != "orthogonal" else ["1"], init_lora_weights=word)
        theirs = peft.get_peft_model(model, config).base_model.model
        layer, ours = theirs.get_submodule("1"), made.program.maps["1"].adapter.inner
        pairs = [(layer.lora_A.default.weight, ours.A), (layer.lora_B.default.weight, ours.B)]
        if word != "orthogonal":
            table, rows = theirs.get_submodule("0"), made.program.maps["0"].adapter.inner
            pairs += [(table.lora_embedding_A.default, rows.A.weight), (table.lora_embedding_B.default, rows.B)]
        for there, here in pairs:
            a, b = (t.detach().flatten() for t in (there, here))
            assert a.shape == b.shape
            assert float(b.std()) == pytest.approx(float(a.std()), rel=0.1, abs=1e-9), (init, a.std(), b.std())
            assert float(b.abs().max()) == pytest.approx(float(a.abs().max()), rel=0.35, abs=1e-9)
        assert init != "orthogonal" or float((ours.B @ ours.A).abs().max()) < 1e-5


def test_a_randomised_pissa_is_as_close_to_the_weight_as_that_of_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24)).eval()
    it = Case(model, {"input": torch.randn(3, 40)})
    made = adapted(it, targets=["**"], r=4, lora_alpha=8, init_lora_weights="pissa_niter_16")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa_niter_16")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model.get_submodule("0")
    W = model.get_submodule("0").weight.detach()
    best = float(torch.linalg.svdvals(W)[4:].norm())
    branch = made.program.maps["0"].adapter.inner
    for B, A in ((branch.B, branch.A), (theirs.lora_B.default.weight, theirs.lora_A.default.weight)):
        assert best * (1 - 1e-5) <= float((W - 2 * B @ A).norm()) <= 1.01 * best
    assert torch.allclose(made.program.maps["0"].base + 2 * branch.B @ branch.A, W, atol=1e-6)


@pytest.mark.slow
def test_a_head_that_is_tied_is_adapted_on_its_own_or_refused(llama: Path, tmp_path: Path) -> None:
    """The adapter of a head acts at the head alone, tied or not, in PEFT; here a tied one must be taken apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    there = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()
    for parameter in there.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    there.save_pretrained(tmp_path)
    made = lrc.compile(str(llama), {"version": 1, "passes": [{"type": "load_adapter", "path": str(tmp_path)}]})
    ids = torch.arange(4, 14)[None]
    got = made.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert distance([got[0] if isinstance(got, tuple) else got.logits], [there(input_ids=ids).logits]) < 1e-5
