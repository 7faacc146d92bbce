"""Tiny models with a tokenizer and data for them, written on the fly: the same numbers every time, and no network.

A plugin of the tests (see `conftest.py`): its fixtures are folders that no test may change; a test that damages a model
copies it first.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once

import importlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.api import Finished, compile_to_folder
from lrc.program import Program
from lrc.verify.cases import Case
from lrc.verify.parity import Artifact, Parity, compare
from lrc.verify.runner import run
from lrc.verify.tolerance import Numerics

TEXT = (
    "a the one two red blue green old new big small cat dog bird fish man woman child car train boat house tree river "
    "sings eats sees finds makes takes gives holds runs walks sleeps stands sits falls on in under over with and or not "
    "quickly slowly today often"
)
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCAB = 64
POSITIONS = 40
LAYERS = "layers:[0-9]"


class Mlp(nn.Module):
    """Three linears, none of them square, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.middle = nn.Linear(20, 16, bias=False)
        self.down = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.middle(torch.relu(self.up(x)))))


def mlp(seed: int = 0) -> Mlp:
    """Return the perceptron in eval mode; another seed gives other weights."""
    torch.manual_seed(seed)
    return Mlp().eval()


def mlp_inputs(rows: int = 8, seed: int = 0) -> Tensor:
    """Return inputs of the perceptron, (rows, 12)."""
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


@cache
def captured_mlp() -> Program:
    """Return the perceptron captured, once for all tests; `lrc.compile` does not change what it is given."""
    return lrc.capture(mlp(), {"x": mlp_inputs()})


def mlp_with_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return what `tiny:mlp_with_inputs` names as MODEL."""
    return mlp(), {"x": mlp_inputs()}


def other_mlp_with_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the same with other weights."""
    return mlp(1), {"x": mlp_inputs()}


def calibration_of_mlp() -> list[dict[str, Tensor]]:
    """Return what `tiny:calibration_of_mlp` names as data."""
    return [{"x": mlp_inputs(32, seed)} for seed in range(4)]


def factorize(**options: Any) -> dict[str, Any]:
    """Return a spec with one pass `factorize`, by default the exact decomposition, which needs no data."""
    return {"version": 1, "passes": [{"type": "factorize", "solver": "svd", **options}]}


def write_tokenizer(folder: Path, names: tuple[str, ...] = ("input_ids", "attention_mask"), *, special: bool = False) -> None:
    """Save a tokenizer of whole words; `special` puts [CLS] and [SEP] around every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=list(names),
    ).save_pretrained(folder)  # fmt: skip


def write_bert(
    folder: Path, kind: str = "BertModel", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Save an encoder of one layer with its tokenizer."""
    import transformers

    given = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": POSITIONS, "initializer_range": 0.2,
    }  # fmt: skip
    model = getattr(transformers, kind)(transformers.BertConfig(**(given | config)))
    return save(model, folder, seed, dtype, ("input_ids", "token_type_ids", "attention_mask"), special=True)


def write_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a decoder of one layer, with fewer heads of keys than of queries, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": POSITIONS, "initializer_range": 0.2,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    return save(LlamaForCausalLM(LlamaConfig(**(given | config))), folder, seed, dtype)


def write_mixtral(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a decoder of one layer with four experts, with its tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    given = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": POSITIONS, "num_local_experts": 4, "num_experts_per_tok": 2,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    return save(MixtralForCausalLM(MixtralConfig(**(given | config))), folder, seed, dtype)


def write_gpt2(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a decoder of one layer with transposed weights, a fused qkv and a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    given = {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "initializer_range": 0.2,
        "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    return save(GPT2LMHeadModel(GPT2Config(**(given | config))), folder, seed, dtype)


def save(
    model: Any, folder: Path, seed: int, dtype: torch.dtype, names: tuple[str, ...] = ("input_ids", "attention_mask"), *,
    special: bool = False,
) -> Path:  # fmt: skip
    """Give every tensor numbers that come from `seed` alone, and save the model with a tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.2 * noise if tensor.ndim > 1 else tensor + 0.1 * noise)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder, names, special=special)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """Return a copy of a model folder that a test may damage."""
    return Path(shutil.copytree(folder, target))


def sentence(generator: random.Random, low: int = 3, high: int = 10) -> str:
    """Return some words."""
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def write_data(folder: Path) -> Path:
    """Write calibration and test data of every kind."""
    generator = random.Random(0)
    (folder / "calib.txt").write_text("\n".join(sentence(generator) for _ in range(40)) + "\n")
    (folder / "stream.txt").write_text("\n".join(sentence(generator) for _ in range(80)) + "\n")
    pairs = [f"{sentence(generator)},{sentence(generator)},{generator.random():.3f}" for _ in range(12)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]) + "\n")
    labelled = [f"{sentence(generator)},{i % 3}" for i in range(12)]
    (folder / "labelled.csv").write_text("\n".join(["text,label", *labelled]) + "\n")
    np.savez(folder / "arrays.npz", x=mlp_inputs(64, seed=1).numpy())
    return folder


def state_of(folder: Path) -> Mapping[str, bytes]:
    """Return every file of a folder by name, to see that nothing has changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_here(artifacts: Sequence[tuple[Artifact, Sequence[Case]]], numerics: Numerics) -> list[Parity]:
    """Compare artifacts as `lrc.verify.parity.check` does, in this process: a fresh one takes seconds to import torch."""
    rows: list[Parity] = []
    for artifact, cases in artifacts:
        module, _, name = artifact.opens.partition(":")
        runner = getattr(importlib.import_module(module), name)(artifact.path.absolute())
        rounds = replace(numerics, rounding=artifact.rounding)
        rows += [row for case in cases for row in compare(artifact.format, case, run(runner, case.inputs), rounds)]
    return rows


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check artifacts in this process."""
    monkeypatch.setattr("lrc.run.job.check", check_here)
    monkeypatch.setattr("lrc.run.reexport.check", check_here)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty and writable: what a run leaves beside its output is left there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Answer(NamedTuple):
    """What a command left: its exit code, and what it said on either stream."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it said on the standard output, as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line on the error stream. Fails when there is another number of lines, or the line is no error of ours."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Run = Callable[..., Answer]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_tmp: Path, checked_here: None) -> Run:
    """A function that runs the command line in this process, in an empty folder."""

    def run(*arguments: object) -> Answer:
        from lrc.cli import main

        monkeypatch.setattr("sys.argv", ["lrc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Answer(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data files."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder."""
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with transposed weights and a tied head."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


SPEC = f"""\
# The whole job on the tiny encoder.
version: 1
model: {{task: sentence-similarity}}
calibration: {{dataset: calib.txt, samples: 24, max_length: 16}}
passes:
  - type: factorize
    targets: ["{LAYERS}"]
    solver: kfac
    rank: {{params_kept: 0.6}}
evaluate: {{dataset: pairs.csv, metrics: [spearman], gates: {{max_degradation: 2.0}}}}
export: [{{format: hf}}, {{format: onnx}}, {{format: pt2}}]
"""


@pytest.fixture(scope="session")
def spec(data: Path) -> Path:
    """A spec of the whole job on the encoder, beside its data."""
    path = data / "spec.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="session")
def finished(bert: Path, spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished output folder of the encoder; every artifact was checked in a fresh process."""
    return compile_to_folder(str(bert), spec, output=tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture(scope="session")
def decoder_spec(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec of the whole job on the decoder."""
    path = tmp_path_factory.mktemp("decoder_spec") / "decoder.yaml"
    path.write_text(f"""\
version: 1
passes: [{{type: factorize, targets: ["{LAYERS}"], solver: svd, rank: {{params_kept: 0.7}}}}]
evaluate:
  dataset: {data / "stream.txt"}
  samples: 4
  max_length: 16
  metrics: [perplexity, {{type: generation, tokens: 6, prompt: 5}}]
export: [{{format: onnx}}]
""")
    return path


@pytest.fixture(scope="session")
def finished_decoder(llama: Path, decoder_spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished output folder of the decoder; its artifacts were checked in a fresh process."""
    return compile_to_folder(str(llama), decoder_spec, output=tmp_path_factory.mktemp("decoder") / "out")
