"""The Hugging Face folder: what is in it, and that it loads everywhere as the program in memory."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lrc
from lrc.api import Finished
from lrc.errors import LowerError, ModelError
from lrc.lower.hf_folder import HfExport, copy_sidecars, export_hf, load_model
from lrc.program import Program
from lrc.program.graft import graft
from lrc.verify.tolerance import Numerics

FRESH = """
import torch, transformers
try:
    transformers.AutoModel.from_pretrained(FOLDER)
except ValueError as error:
    assert "lrc_bert" in str(error) and "does not recognize this architecture" in str(error)
else:
    raise SystemExit("transformers took the folder without our package")
import lrc.hf
for name, model in (("auto", transformers.AutoModel.from_pretrained(FOLDER)), ("load", lrc.load(FOLDER))):
    model.eval()
    for case in "ab":
        given = {k[2:]: v for k, v in inputs.items() if k.startswith(case)}
        with torch.no_grad():
            outputs[f"{name}/{case}"] = model(**given).last_hidden_state.contiguous()
"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def close(found: Tensor, expected: Tensor, program: Program) -> bool:
    difference = (found.double() - expected.double()).abs()
    allowed = Numerics.of(program.tensors()).tolerance(expected)
    return float(difference.max()) <= allowed.largest and float(difference.mean()) <= allowed.mean


def compiled(folder: Path, tmp: Path, **options: Any) -> Program:
    spec = tiny.factorize(targets=[tiny.LAYERS], rank={"fraction": 0.25}, **options)
    return lrc.compile(str(folder), spec, cache=tmp / "cache").program


def test_a_fresh_process_gives_the_same_at_two_shapes_with_padding(
    finished: Finished, encoder: Program, fresh: Callable[..., Any], two_shapes: Mapping[str, dict[str, Tensor]]
) -> None:
    inputs = {f"{case}/{name}": value for case, given in two_shapes.items() for name, value in given.items()}
    outputs = fresh(FRESH.replace("FOLDER", repr(str(finished.path))), inputs)
    for key, found in outputs.items():
        with torch.no_grad():
            expected = encoder(**two_shapes[key[-1]])["last_hidden_state"]
        assert close(found, expected, encoder), key
    assert sorted(outputs) == ["auto/a", "auto/b", "load/a", "load/b"]


def test_the_run_itself_checked_two_shapes_in_a_fresh_process(finished: Finished) -> None:
    rows = [row for row in finished.record.parity if row["format"] == "hf"]
    assert {(row["shape"], row["output"]) for row in rows} == {
        (shape, output) for shape in ("1x9", "3x20") for output in ("last_hidden_state", "pooler_output")
    }
    assert all(row["ok"] for row in rows)


def test_the_weights_are_plain_safetensors_with_the_factors_by_name(finished: Finished, encoder: Program) -> None:
    kinds = {path.suffix for path in finished.path.rglob("*") if path.is_file()}
    assert not kinds & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    with safe_open(finished.path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    for fqn, made in encoder.maps.items():
        assert {f"{fqn}.{name}" for name in made.state_dict()} <= names
        assert f"{fqn}.weight" not in names or repr(made).startswith("Dense")


def test_the_config_names_our_type_and_the_map_at_every_site(finished: Finished, encoder: Program, bert: Path) -> None:
    config = read_json(finished.path / "config.json")
    assert config["model_type"] == "lrc_bert"
    assert config["lrc"]["format"] == 1
    assert config["lrc"]["task"] == "sentence-similarity"
    assert config["lrc"]["sites"] == {fqn: made.structure() for fqn, made in encoder.maps.items()}
    original = read_json(bert / "config.json")
    kept = {key: value for key, value in config.items() if key not in ("lrc", "model_type")}
    assert kept == {key: value for key, value in original.items() if key not in ("model_type", "_name_or_path")}


def test_the_tokenizer_comes_with_the_folder(finished: Finished, bert: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (finished.path / name).read_bytes() == (bert / name).read_bytes()


def test_small_files_beside_the_weights_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = ["vocab.txt", "chat_template.jinja", "merges.txt", "tokenizer.model", "modules.json", "1_Pooling/config.json"]
    unwanted = [
        "README.md", "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", ".hidden.json", "onnx/config.json", "openvino/model.json", "lrc/plan.json",
        "pictures/cat.png", "script.py",
    ]  # fmt: skip
    for name in [*wanted, *unwanted]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_sidecars(source, target)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == sorted(wanted)


def test_the_card_tells_what_it_is_and_how_to_load_it(finished: Finished, bert: Path) -> None:
    card = (finished.path / "README.md").read_text()
    before, after = finished.record.plan.parameters
    assert card.startswith(f"# {bert.name}, compressed by lrc\n")
    assert f"({after / before:.1%} kept)" in card
    assert "model = lrc.load(folder)" in card
    assert "import lrc.hf; AutoModel.from_pretrained(folder)" in card
    assert 'onnxruntime.InferenceSession(folder + "/onnx/model.onnx")' in card
    assert "| spearman |" in card
    assert "params_kept: 0.6" in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    program = compiled(tiny.write_llama(tmp_path / "model", dtype=dtype), tmp_path)
    export_hf(program, tmp_path / "out", HfExport())
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} <= {dtype, torch.int32}
    reloaded = load_model(tmp_path / "out")
    ids = torch.arange(4, 14).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, graft(program)(input_ids=ids).logits)


def test_a_decoder_says_the_same_after_reloading(llama: Path, tmp_path: Path) -> None:
    program = compiled(llama, tmp_path)
    export_hf(program, tmp_path / "out", HfExport())
    ids = torch.tensor([[5, 9, 13, 21]])
    said = [
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        for model in (graft(program), load_model(tmp_path / "out"))
    ]
    assert torch.equal(said[0], said[1])
    assert said[0].shape[1] > 5
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_tied_head_stays_tied_and_an_untied_one_is_stored(gpt2: Path, tmp_path: Path) -> None:
    ids = torch.arange(4, 14).reshape(2, 5)
    for policy, targets in (("keep", ["transformer.h.*.mlp.*"]), ("untie", ["lm_head"])):
        spec = tiny.factorize(targets=targets, rank=6, tied=policy, form="two_factor")
        program = lrc.compile(str(gpt2), spec, cache=tmp_path / "cache").program
        export_hf(program, tmp_path / policy, HfExport())
        names = set(load_file(tmp_path / policy / "model.safetensors"))
        assert "transformer.wte.weight" in names
        assert ("lm_head.A" in names) == (policy == "untie")
        assert "lm_head.weight" not in names
        assert read_json(tmp_path / policy / "config.json")["tie_word_embeddings"] == (policy == "keep")
        reloaded = load_model(tmp_path / policy)
        with torch.no_grad():
            assert close(reloaded(input_ids=ids).logits, program(input_ids=ids)["logits"], program)


# Refusals.


def damaged(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a folder with other weights."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def a_factor(tensors: Mapping[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith((".A", ".P", ".A.weight")))


def test_a_missing_factor_is_an_error_and_never_a_random_number(finished: Finished, tmp_path: Path) -> None:
    folder = damaged(finished.path, tmp_path / "copy", lambda tensors: tensors.pop(a_factor(tensors)))
    with pytest.raises(ModelError, match=r"the weights lack 1 tensors, first 'encoder\.layer\.0\..*\.[AP](\.weight)?'"):
        lrc.load(folder)


def test_a_number_that_is_not_finite_is_an_error(finished: Finished, tmp_path: Path) -> None:
    folder = damaged(finished.path, tmp_path / "copy", lambda tensors: tensors[a_factor(tensors)].fill_(torch.nan))
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\..*: expected finite numbers"):
        lrc.load(folder)


def test_a_folder_of_a_later_format_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.path, tmp_path / "copy"))
    config = read_json(folder / "config.json")
    config["lrc"]["format"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json: lrc\.format: expected format 1, got 2\. Update lrc-compiler"):
        lrc.load(folder)


def test_only_transformers_models_have_such_a_folder(rewritten: Program, tmp_path: Path) -> None:
    with pytest.raises(LowerError, match=r"only transformers models have a Hugging Face folder\. Export `format: pt2` instead"):
        export_hf(rewritten, tmp_path / "out", HfExport())


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a folder with `config\.json` or `program\.pt2`, got neither"):
        lrc.load(tmp_path)
