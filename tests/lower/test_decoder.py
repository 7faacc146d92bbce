"""The ONNX decoder with a key-value cache: it says what transformers says, token for token, from an empty cache on."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import models
import numpy as np
import onnx
import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.api import Finished, compile_to_folder
from lrc.errors import UsageError
from lrc.lower.onnx_file import FILE, PREFILL, OnnxExport, export_onnx
from lrc.lower.ort import OrtRunner
from lrc.lower.ort_decoder import OnnxDecoder, open_onnx
from lrc.program import Program
from lrc.program.graft import graft
from lrc.program.source import Source, load_program
from lrc.verify.cases import Case
from lrc.verify.decoding import cases_of
from lrc.verify.parity import Parity, compare
from lrc.verify.runner import run
from lrc.verify.tolerance import Numerics

PRIVATE = (b"/work", b"/tmp", b"/root", b"site-packages", b".py", b"Traceback")
PROMPTS = ((1, 5, 0), (3, 6, 3), (1, 1, 0), (2, 9, 4))  # texts, tokens, those that pad all but the last text on the left
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},  # fewer heads of keys than of queries, a tied head
    "gpt2": {"n_layer": 2},
    "mistral": {},  # a window of four tokens
    "opt": {},
}


class Exported(NamedTuple):
    """A tiny decoder with a product of rank 4 at every site but its head, and its ONNX file."""

    program: Program
    path: Path


def gemma3() -> nn.Module:
    """A layer with a window of four tokens, and one that sees them all."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    sizes = {**models.DECODER, "num_hidden_layers": 2, "head_dim": 4, "sliding_window": 4, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()


def saved(model: Any, folder: Path) -> Program:
    model.save_pretrained(folder)
    return load_program(Source(str(folder)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A function that gives a decoder by the name of its architecture, exported once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            dense = saved(gemma3() if name == "gemma3" else models.build(name, **CHANGES[name]), folder / "model")
            program = models.factorized(dense, 4, ignore=("lm_head", "model.decoder.embed_positions.weight"))
            made[name] = Exported(program, folder / export_onnx(program, folder, OnnxExport()).artifact)
        return made[name]

    return get


def prompts(texts: int, length: int, padding: int, vocabulary: int = models.VOCAB) -> dict[str, Tensor]:
    ids = torch.randint(3, vocabulary, (texts, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[:-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def said(program: Program, given: Mapping[str, Tensor], tokens: int, eos: Any = None) -> Tensor:
    """What transformers generates with the program's maps."""
    model: Any = graft(program).eval()
    found: Tensor = model.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    return found


def parities(program: Program, runner: Any, cases: list[Case]) -> list[Parity]:
    numerics = Numerics.of(program.tensors())
    return [row for case in cases for row in compare("onnx", case, run(runner, case.inputs), numerics)]


# What it says.


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "opt", "gemma3"])
def test_it_generates_what_transformers_does_token_for_token(name: str, exported: Callable[[str], Exported]) -> None:
    """Texts of several lengths run together, padded on the left; some end early, with one or any of several tokens."""
    program, path = exported(name)
    decoder = OnnxDecoder(path)
    for shape in PROMPTS:
        given = prompts(*shape)
        for eos in (None, 2, [5, 9, 11, 20]):
            found = decoder.generate(**given, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
            np.testing.assert_array_equal(found, said(program, given, 12, eos).numpy(), err_msg=f"{shape}, eos {eos}")


def test_real_weights_generate_what_transformers_does(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260k"
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    spec = tiny.factorize(targets=["model.layers.**"], rank={"params_kept": 0.8})
    program = lrc.compile(str(folder), spec, cache=tmp_path / "cache").program
    decoder = OnnxDecoder(tmp_path / export_onnx(program, tmp_path, OnnxExport()).artifact)
    lengths = (4, 17, 30)
    ids, mask = torch.zeros(3, max(lengths), dtype=torch.int64), torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.tensor(stories[row][:length]), 1
    for given in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[2:], "attention_mask": mask[2:]}):
        np.testing.assert_array_equal(decoder.generate(**given, max_new_tokens=64), said(program, given, 64).numpy())
    assert all(row.ok for row in parities(program, decoder, cases_of(program, cached=True)))


def test_what_follows_the_end_of_a_text_is_the_first_end_token_by_default(exported: Callable[[str], Exported]) -> None:
    decoder = OnnxDecoder(exported("gpt2").path)
    given = prompts(3, 6, 3)
    free = decoder.generate(**given, max_new_tokens=8)
    end = int(free[0, 7])  # the second new token of the first text
    found = decoder.generate(**given, max_new_tokens=8, eos_token_id=end)
    assert set(found[0, 8:].tolist()) <= {end}
    alone = decoder.generate(given["input_ids"][:1], given["attention_mask"][:1], max_new_tokens=8, eos_token_id=end)
    assert alone[0].tolist() == free[0, : 6 + (free[0, 6:] == end).argmax() + 1].tolist()
    assert decoder.generate(**given, max_new_tokens=0).tolist() == given["input_ids"].tolist()


def test_a_step_at_a_time_gives_the_logits_of_the_whole_text(exported: Callable[[str], Exported]) -> None:
    program, path = exported("llama")
    decoder, ids = OnnxDecoder(path), prompts(2, 9, 0)["input_ids"]
    with torch.no_grad():
        whole = program(input_ids=ids)["logits"]
    allowed = Numerics.of(program.tensors()).tolerance(whole).largest
    state = decoder.prefill(ids[:, :4])
    for place in range(4, 9):
        np.testing.assert_allclose(state.logits, whole[:, place - 1], rtol=0, atol=allowed)
        state = decoder.step(state, ids[:, place].numpy())
    assert {value.shape()[2] for value in state.cache.values()} == {9}
    np.testing.assert_allclose(state.logits, whole[:, -1], rtol=0, atol=allowed)


def test_it_needs_neither_torch_nor_transformers(exported: Callable[[str], Exported]) -> None:
    code = (
        "import sys; from lrc.lower.ort_decoder import OnnxDecoder\n"
        "print(OnnxDecoder(sys.argv[1]).generate([[5, 6], [7, 8]], max_new_tokens=3).tolist())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    path = exported("gpt2").path
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == OnnxDecoder(path).generate(np.array([[5, 6], [7, 8]]), max_new_tokens=3).tolist()


# What is checked.


def test_the_run_checked_whole_texts_and_one_token_after_a_cached_text_in_a_fresh_process(finished_decoder: Finished) -> None:
    finished_decoder.raise_on_failure()
    rows = [row for row in finished_decoder.record.parity if row["format"] == "onnx"]
    outputs = {"logits", "present.0.key", "present.0.value"}
    assert {(row["shape"], row["output"]) for row in rows} == {
        (shape, output) for shape in ("1x9", "3x20", "3x1, 3x20, 3x2x19x8") for output in outputs
    }
    assert all(row["ok"] for row in rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_every_case_is_met_and_a_forgotten_cache_is_seen(name: str, exported: Callable[[str], Exported]) -> None:
    program, path = exported(name)
    cases = cases_of(program, cached=True)
    assert all(row.ok for row in parities(program, OrtRunner(path), cases))
    step = cases[-1]
    emptied = {name: torch.zeros_like(t) if name.startswith("past") else t for name, t in step.inputs.items()}
    (logits, *_) = parities(program, OrtRunner(path), [Case(emptied, step.expected)])
    assert not logits.ok


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoders_run_on_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    program = lrc.capture(str(tiny.write_llama(tmp_path / "model", dtype=dtype)))
    written = export_onnx(program, tmp_path, OnnxExport())
    assert all(row.ok for row in parities(program, OrtRunner(tmp_path / FILE), cases_of(program, cached=True)))
    assert written.cached
    assert OnnxDecoder(tmp_path / FILE).generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


# The file.


def test_inputs_outputs_and_sizes_have_the_names_that_servers_expect(exported: Callable[[str], Exported]) -> None:
    path = exported("llama").path
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    text, cache = ["batch", "sequence"], {}
    for layer in range(2):
        for part in ("key", "value"):
            cache[f"past_key_values.{layer}.{part}"] = ["batch", 2, "past", 4]
            cache[f"present.{layer}.{part}"] = ["batch", 2, "past + sequence", 4]
    assert sizes == {
        "input_ids": text, "attention_mask": ["batch", "total"], "position_ids": text, "logits": [*text, models.VOCAB], **cache,
    }  # fmt: skip


def test_the_weights_are_called_as_in_the_file_without_a_cache(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    program, path = exported("opt")
    export_onnx(program, tmp_path, OnnxExport(cache=False))
    with_cache, without = (
        {tensor.name for tensor in onnx.load(file).graph.initializer if "." in tensor.name} for file in (path, tmp_path / FILE)
    )
    assert with_cache == without
    assert {"model.decoder.embed_tokens.weight", "model.decoder.layers.0.fc1.A"} <= with_cache


def test_nothing_in_the_file_tells_of_the_machine(exported: Callable[[str], Exported]) -> None:
    for name in ("llama", "gpt2"):
        path = exported(name).path
        assert not [word for word in PRIVATE if word in path.read_bytes()]
        model = onnx.load(path)
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    program, path = exported("gpt2")
    assert isinstance(program.origin.folder, Path)
    code = (
        "import sys, models; from pathlib import Path\n"
        "from lrc.lower.onnx_file import OnnxExport, export_onnx\n"
        "from lrc.program.source import Source, load_program\n"
        "program = models.factorized(load_program(Source(sys.argv[1])), 4, ignore=('lm_head',))\n"
        "export_onnx(program, Path(sys.argv[2]), OnnxExport())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(program.origin.folder), str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((tmp_path / FILE).read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_large_weights_stand_beside_the_file(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    program = exported("gpt2").program
    export_onnx(program, tmp_path, OnnxExport(external_data="always"))
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert all(row.ok for row in parities(program, OrtRunner(tmp_path / FILE), cases_of(program, cached=True)))


def test_the_graph_of_whole_texts_is_written_when_asked_and_says_so(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    program = exported("gpt2").program
    written = export_onnx(program, tmp_path, OnnxExport(cache=False))
    assert (written.cached, written.notes) == (False, (PREFILL,))
    runner = open_onnx(tmp_path / FILE)
    assert isinstance(runner, OrtRunner)
    assert (runner.inputs, runner.outputs) == (("input_ids", "attention_mask"), ("logits",))
    with pytest.raises(UsageError, match=r"expected inputs past_key_values\.0\.key, …, got input_ids, .*with `cache: true`"):
        OnnxDecoder(runner)


# Refusals.


def hybrid(folder: Path) -> Path:
    """A decoder with a layer that keeps the state of a convolution in place of keys and values."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {**models.DECODER, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    Lfm2ForCausalLM(Lfm2Config(**sizes)).save_pretrained(folder)
    return folder


def test_a_cache_of_another_kind_is_refused_before_any_pass_and_the_remedy_works(tmp_path: Path, checked_here: None) -> None:
    spec = {**tiny.factorize(targets=["**.q_proj"], rank=2), "export": [{"format": "onnx"}]}
    folder = str(hybrid(tmp_path / "model"))
    wanted = (
        r"export\.onnx\.cache: the key-value cache cannot be exported: layer 0 keeps its past in a LinearAttentionLayer, "
        r"not in keys and values alone\. Set `cache: false`"
    )
    with pytest.raises(UsageError, match=wanted) as refused:
        compile_to_folder(folder, spec, output=tmp_path / "out", cache=tmp_path / "cache")
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    spec["export"] = [{"format": "onnx", "cache": False}]
    done = compile_to_folder(folder, spec, output=tmp_path / "out", cache=tmp_path / "cache")
    done.raise_on_failure()
    assert done.record.artifacts["onnx"]["notes"] == [PREFILL]


def test_a_cache_is_refused_for_what_generates_no_text(encoder: Program, rewritten: Program, tmp_path: Path) -> None:
    for program, name in ((encoder, "BertModel"), (rewritten, "Mlp"), (replace_model(rewritten, None), "NoneType")):
        with pytest.raises(UsageError, match=rf"{name} is no model of transformers that generates text\. Set `cache: false`"):
            export_onnx(program, tmp_path, OnnxExport(cache=True))


def replace_model(program: Program, model: nn.Module | None) -> Program:
    twin = program.clone()
    twin.origin = replace(twin.origin, model=model)
    return twin


def test_prompts_that_it_would_answer_wrongly_are_refused(exported: Callable[[str], Exported]) -> None:
    decoder = OnnxDecoder(exported("gpt2").path)
    given = prompts(2, 5, 0)
    right = given["attention_mask"].clone()
    right[0, -1] = 0
    with pytest.raises(UsageError, match="attention_mask: expected padding on the left, got a masked last token"):
        decoder.generate(given["input_ids"], right, max_new_tokens=2)
    with pytest.raises(UsageError, match=r"two of shape \(batch, length >= 1\), got \[2, 5\] and \[2, 4\]"):
        decoder.generate(given["input_ids"], right[:, :4], max_new_tokens=2)
    with pytest.raises(UsageError, match=r"got \[2, 0\] and \[2, 0\]"):
        decoder.generate(given["input_ids"][:, :0], max_new_tokens=2)
