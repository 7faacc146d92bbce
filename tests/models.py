"""Tiny random models of many architectures, captured once a session, exact maps for their sites, and how runs may differ."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from lrc.data import Batches
from lrc.maps import LinearMap, Pivoted
from lrc.program import Origin, Program, Site
from lrc.program.capture import capture_module
from lrc.program.source import Source, load_program
from lrc.program.tasks import infer_task

Inputs = dict[str, Tensor]
VOCAB = 32
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.3}
DECODER = {**ENCODER, **ENDS, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # the class of the model, and what its config says
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        {**ENDS, "vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.3},
    ),
    "opt": (
        "OPTForCausalLM",
        {**SIZES, **ENDS, "ffn_dim": 24, "max_position_embeddings": 40, "word_embed_proj_dim": 8, "init_std": 0.3},
    ),
    "bert": ("BertModel", ENCODER),
    "roberta": ("RobertaForMaskedLM", {**ENCODER, "type_vocab_size": 1, "pad_token_id": 0}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20}
        | {"num_labels": 3, "initializer_range": 0.3},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        | {"tie_word_embeddings": True, "decoder_start_token_id": 0},
    ),
    "vit": (
        "ViTForImageClassification",
        {**SIZES, "intermediate_size": 24, "image_size": 16, "patch_size": 8, "num_labels": 3, "initializer_range": 0.3},
    ),
}


USING_CACHE = {"llama", "gpt2", "bert"}


def build(name: str, **changes: Any) -> nn.Module:
    """Return a new random transformers model in eval mode; the same numbers every time."""
    import transformers

    kind, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    made: nn.Module = model_class(model_class.config_class(**{**options, **changes})).eval()
    return made


@dataclass(frozen=True)
class Captured:
    """A model folder, the model that was loaded from it, and the program captured of that model."""

    folder: Path
    model: nn.Module
    dense: Program

    @property
    def program(self) -> Program:
        """A program that a test may rewrite; its tensors are shared, so it may not train them."""
        return self.dense.clone()


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Captured]:
    """A function that gives a tiny model by the name of its architecture, saved, loaded and captured once a session."""
    made: dict[str, Captured] = {}

    def get(name: str) -> Captured:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(folder)  # type: ignore[operator]  # a transformers model
            program = load_program(Source(str(folder)))
            assert program.origin.model is not None
            made[name] = Captured(folder, program.origin.model, program)
        return made[name]

    return get


@pytest.fixture(scope="session")
def doubled() -> Callable[[str], Program]:
    """A function that gives the program of a tiny model in float64, captured once a session; it may not be rewritten."""
    made: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in made:
            model = build(name).double()
            examples = inputs_for(name, 2, 7, padded=False)
            made[name] = capture_module(
                model,
                examples,
                dynamic={key: {0: "batch", 1: "sequence"} for key in examples},
                largest={"sequence": 20},
                constants={"use_cache": False} if name in USING_CACHE else {},
                origin=Origin(task=infer_task({"architectures": [type(model).__name__]}, Path())),
            )
        return made[name]

    return get


def inputs_for(name: str, batch: int, length: int, *, padded: bool = True, seed: int = 1) -> Inputs:
    """Return inputs of an architecture; `padded` hides the ends of all texts but the first."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch if padded else 0):
        mask[row, max(1, length - 2 * row) :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        made["token_type_ids"] = torch.randint(0, 2, (batch, length), generator=generator)
    if name == "t5":
        made["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 1), generator=generator)
    return made


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a transformers model gives, by name, without its cache."""
    with torch.no_grad():
        found = model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def assert_agree(found: Tensor, expected: Tensor, steps: int = 1) -> None:
    """Two runs of one function: the same shape and type, apart by at most 8 eps times the spread of the outputs.

    steps: how many products stand behind one another that the two runs may round in their own ways.
    """
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = 8 * steps * torch.finfo(expected.dtype).eps * float(expected.detach().double().std(correction=0))
    assert apart(found, expected) <= tolerance


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((a - b).detach().abs().max())


def batches(*items: Inputs) -> Batches:
    """Return calibration batches."""
    return Batches(tuple(items))


def exact_chain(site: Site) -> LinearMap:
    """Return a product of two factors that stands for a site's own weight."""
    return low_rank(site, min(site.shape))


def exact_pivoted(site: Site, side: str = "out") -> Pivoted:
    """Return the pivoted form of a site's own weight, of full rank; `side` says whether rows or columns are chosen."""
    weight, bias = site.map.exact()
    tall = weight if side == "out" else weight.T
    rank = min(tall.shape)
    order = torch.from_numpy(scipy.linalg.qr(tall.T.numpy(), pivoting=True)[2]).long()
    P, others = tall[order[:rank]], tall[order[rank:]]
    Z = (others @ torch.linalg.pinv(P)).to(site.dtype)
    index = order.argsort() if side == "out" else order
    kept = (P if side == "out" else P.T).contiguous().to(site.dtype)
    return Pivoted(kept, Z, index, side, None if bias is None else bias.to(site.dtype))  # type: ignore[arg-type]


def low_rank(site: Site, rank: int) -> LinearMap:
    """Return the closest product of a rank."""
    weight, bias = site.map.exact()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    B, A = (factor.to(site.dtype).contiguous() for factor in ((U * S)[:, :rank], Vh[:rank]))
    return site.layout.product(B, A, None if bias is None else bias.to(site.dtype))


def factorized(program: Program, rank: int = 4, ignore: tuple[str, ...] = ()) -> Program:
    """Return the program with a product of a rank at every site but those ignored."""
    for fqn, site in program.sites.items():
        if fqn not in ignore:
            program.replace(fqn, low_rank(site, rank), "factorize", settle=False)
    program.settle()
    return program


class Perceptron(nn.Module):
    """Two linears around a nonlinearity; wide, so that swapped sizes show."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(6, width)
        self.down = nn.Linear(width, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def perceptron(*, width: int = 8, dtype: torch.dtype = torch.float32) -> Perceptron:
    """Return a new perceptron, the same one every time."""
    torch.manual_seed(0)
    return Perceptron(width).to(dtype).eval()


class Block(nn.Module):
    """A block with norms before it, of a choice of norm, and what else may read the residual stream."""

    def __init__(self, norm: nn.Module, reads: str = "norm") -> None:
        super().__init__()
        self.first, self.last = norm, copy.deepcopy(norm)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.table, self.reads = nn.Embedding(10, 8), reads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.first(x))))
        if self.reads == "tanh":
            x = torch.tanh(x)
        y = self.last(x) if self.reads != "raw" else x
        return self.head(torch.relu(y) if self.reads == "relu" else y)


def block(norm: nn.Module, reads: str = "norm") -> Block:
    """Return a new block in eval mode, the same one every time."""
    torch.manual_seed(0)
    return Block(norm, reads).eval()
