"""Folders of ours in transformers' auto classes: only after `import lrc.hf`, and never with a number missing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from models import Captured, assert_agree, exact_pivoted, factorized, inputs_for, low_rank, outputs_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import lrc.hf
from lrc.errors import ModelError
from lrc.lower.hf_folder import HfExport, export_hf
from lrc.maps import Chain, Dense, Pivoted
from lrc.program import Program
from lrc.program.auto_classes import install, register
from lrc.program.source import Source, load_program

Get = Callable[[str], Captured]
QUERY = "model.layers.0.self_attn.q_proj"
FACTOR = f"{QUERY}.A"


@pytest.fixture(scope="module")
def program(captured: Get) -> Program:
    """A Llama with products everywhere but in one site, which has the pivoted form."""
    program = captured("llama").program
    pivoted = "model.layers.0.mlp.up_proj"
    program.replace(pivoted, exact_pivoted(program.sites[pivoted]), "factorize")
    return factorized(program, ignore=(pivoted,))


@pytest.fixture(scope="module")
def saved(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    export_hf(program, folder, HfExport())
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_the_config_names_our_type_and_the_map_of_every_site(saved: Path, program: Program) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "lrc_llama"
    assert config["tie_word_embeddings"] is False
    assert config["lrc"]["format"] == 1
    assert config["lrc"]["task"] == "text-generation"
    assert config["lrc"]["sites"] == {fqn: made.structure() for fqn, made in program.maps.items()}
    stored = load_file(saved / "model.safetensors")
    assert {FACTOR, f"{QUERY}.B", "model.layers.0.mlp.up_proj.index", "lm_head.A", "model.embed_tokens.weight"} <= set(stored)
    assert f"{QUERY}.weight" not in stored


def test_a_reloaded_model_equals_the_program(saved: Path, program: Program) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "LrcLlamaForCausalLM"
    assert {fqn: repr(model.get_submodule(fqn)) for fqn in program.maps} == {f: repr(m) for f, m in program.maps.items()}
    inputs = inputs_for("llama", 3, 9)
    assert_agree(outputs_of(model, inputs)["logits"], program(**inputs)["logits"].detach())
    ids = inputs_for("llama", 2, 4, padded=False)
    tokens = [model.generate(**ids, do_sample=False, max_new_tokens=6, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_a_reloaded_model_can_be_captured_saved_and_reloaded_again(saved: Path, program: Program, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == "lrc_llama"
    assert config["lrc"] == json.loads((saved / "config.json").read_text())["lrc"]
    first, second = load_file(saved / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    again = load_program(Source(str(tmp_path / "again")))
    assert again.task == "text-generation"
    inputs = inputs_for("llama", 3, 9)
    assert_agree(again(**inputs)["logits"], program(**inputs)["logits"])


def test_a_head_that_its_config_always_ties_to_the_embedding_keeps_its_own_map(captured: Get, tmp_path: Path) -> None:
    program = captured("t5").program
    program.replace("lm_head", low_rank(program.sites["lm_head"], 3), "factorize")
    export_hf(program, tmp_path, HfExport())
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(model.lm_head, Chain)
    assert list(model.lm_head.state_dict()) == ["B", "A"]
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    inputs = inputs_for("t5", 3, 9)
    assert_agree(outputs_of(model, inputs)["logits"], program(**inputs)["logits"])


def test_the_body_and_other_heads_load_from_the_same_folder(saved: Path) -> None:
    body = AutoModel.from_pretrained(saved)
    assert isinstance(body, transformers.LlamaModel)
    assert isinstance(body.layers[0].self_attn.q_proj, Chain)
    inputs = inputs_for("llama", 2, 5)
    whole = AutoModelForCausalLM.from_pretrained(saved)
    assert_agree(outputs_of(body, inputs)["last_hidden_state"], outputs_of(whole.model, inputs)["last_hidden_state"])


def test_factors_take_the_dtype_that_is_asked_for_and_an_index_keeps_its_own(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    stored = load_file(saved / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.endswith(".index"):
            assert tensor.dtype == torch.int32
            assert torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, stored[name].bfloat16())
    assert isinstance(model.model.layers[0].mlp.up_proj, Pivoted)
    assert outputs_of(model, inputs_for("llama", 2, 5))["logits"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", [FACTOR, "model.layers.0.mlp.up_proj.index", "model.norm.weight"])
def test_a_missing_tensor_is_an_error_and_never_memory_that_nobody_wrote(name: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert caught.value.where == str(folder)
    assert caught.value.message == f"the weights lack 1 tensors, first {name!r}"
    with pytest.raises(ModelError, match=f"the weights lack 1 tensors, first '{name}'"):
        load_program(Source(str(folder)))


def test_numbers_that_are_not_finite_are_an_error(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state[FACTOR][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{FACTOR}: expected finite numbers, got 1 of 64 that are NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda section: section.update(format=2), r"config.json: lrc.format: expected format 1, got 2. Update lrc-compiler"),
        (lambda section: section["sites"].update({QUERY: {"map": "nonsense"}}), "not the structure of a map"),
        (lambda section: section["sites"].update({QUERY: {"map": "dense", "shape": [3, 3], "bias": False}}), QUERY),
    ],
    ids=["format", "map", "shape"],
)
def test_a_damaged_section_is_an_error(change: Callable[[dict[str, object]], None], error: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["lrc"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=error):
        load_program(Source(str(folder)))


def test_a_config_of_ours_without_the_section_is_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["lrc"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no attribute 'lrc'"):
        load_program(Source(str(folder)))


def test_registering_twice_changes_nothing(saved: Path) -> None:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content
    before = AutoConfig.from_pretrained(saved)
    register()
    lrc.hf.register()
    assert transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content is mapping
    assert type(AutoConfig.from_pretrained(saved)) is type(before)
    assert isinstance(before, transformers.LlamaConfig)
    assert before.model_type == "lrc_llama"


def test_other_model_types_are_as_they_were(captured: Get) -> None:
    assert type(AutoConfig.from_pretrained(captured("llama").folder)) is transformers.LlamaConfig
    assert type(AutoModel.from_pretrained(captured("bert").folder)) is transformers.BertModel
    for unknown in ("lrc_nonsense", "lrc_", "nonsense"):
        with pytest.raises(ValueError, match="Unrecognized model identifier"):
            AutoConfig.for_model(unknown)


def test_the_tokenizer_loads_from_our_folder(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.decode(tokenizer("the red cat")["input_ids"]) == "the red cat"


def test_maps_are_made_in_the_dtype_of_the_config_and_sites_that_a_body_lacks_are_left_out(captured: Get) -> None:
    model = captured("bert").model
    structure = {"map": "dense", "shape": [16, 16], "bias": True}
    section = {"format": 1, "sites": {"bert.pooler.dense": structure, "cls.predictions.decoder": structure}}
    twin = transformers.BertModel(model.config)
    twin.config.dtype = torch.float16
    default = torch.get_default_dtype()
    install(twin, section)
    assert torch.get_default_dtype() == default
    assert isinstance(twin.pooler.dense, Dense)
    assert twin.pooler.dense.weight.dtype == torch.float16


SCRIPT = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
    try:
        load(folder)
    except ValueError as error:
        assert "lrc_llama" in str(error) and "does not recognize this architecture" in str(error), error
    else:
        raise SystemExit("transformers loaded a folder of ours without lrc.hf")
import lrc.hf
model = AutoModelForCausalLM.from_pretrained(folder)
print(type(model).__name__, AutoConfig.from_pretrained(folder).model_type, model.lm_head)
"""


def test_without_our_import_transformers_refuses_and_with_it_loads(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LrcLlamaForCausalLM lrc_llama Chain[32,4,16]\n"
