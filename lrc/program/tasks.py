"""Tasks, as transformers names them: which class loads a model, and which inputs it is captured with."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrc.errors import CaptureError, UsageError

AUTO_CLASS = {
    "feature-extraction": "AutoModel",
    "sentence-similarity": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
    "audio-classification": "AutoModelForAudioClassification",
}
BY_ARCHITECTURE = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification", "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification",
}  # fmt: skip
BATCH, LENGTH, TARGET_LENGTH, SAMPLES = 2, 7, 5, 16000


class Examples(NamedTuple):
    """What a model is captured with: tensors, their dynamic sizes, bounds of these, and arguments that are no tensors."""

    tensors: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    largest: dict[str, int]
    constants: dict[str, Any]


def infer_task(config: Mapping[str, Any], folder: Path) -> str:
    """Return the task that `config.json` and the folder's files tell."""
    if (folder / "modules.json").is_file():  # written by sentence-transformers
        return "sentence-similarity"
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    for suffix, task in BY_ARCHITECTURE.items():
        if architecture.endswith(suffix):
            return task
    return "feature-extraction"


def auto_class(task: str) -> str:
    """Return the name of the transformers class that loads models of a task. Raises UsageError for an unknown task."""
    if task not in AUTO_CLASS:
        raise UsageError("model.task", expected=f"one of {', '.join(AUTO_CLASS)}", got=task)
    return AUTO_CLASS[task]


def example_inputs(model: nn.Module, config: Any, folder: Path) -> Examples:
    """Return what to capture a transformers model with, chosen by its main input and its tokenizer's outputs.

    Raises CaptureError for a model whose main input is not known.
    """
    accepted = signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, str]] = {}
    text = _part(config, "text_config")
    vision = _part(config, "vision_config")
    if "pixel_values" in accepted and (main == "pixel_values" or hasattr(config, "vision_config")):
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tensors["pixel_values"] = torch.randn(BATCH, getattr(vision, "num_channels", 3), height, width, generator=generator)
        dynamic["pixel_values"] = {0: "batch"}
    if main in {"input_values", "input_features"}:
        shape = (BATCH, SAMPLES) if main == "input_values" else (BATCH, _mels(config), _frames(config))
        tensors[main] = torch.randn(shape, generator=generator)
        dynamic[main] = {0: "batch"}
    if "input_ids" in accepted and (main == "input_ids" or hasattr(config, "text_config")):
        ids = torch.randint(int(getattr(text, "vocab_size", 2)), (BATCH, LENGTH), generator=generator)
        for name in token_inputs(folder, config):
            if name in accepted:
                tensors[name] = ids if name == "input_ids" else torch.full_like(ids, int(name == "attention_mask"))
                dynamic[name] = {0: "batch", 1: "sequence"}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        tensors["decoder_input_ids"] = torch.randint(
            int(getattr(text, "vocab_size", 2)), (BATCH, TARGET_LENGTH), generator=generator
        )
        dynamic["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
    if not tensors:
        raise CaptureError(type(model).__name__, message=f"no example for the main input {main!r}", hint="Use Python")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    constants = {"use_cache": False} if "use_cache" in accepted else {}
    return Examples(tensors, dynamic, _largest(text), constants)


def token_inputs(folder: Path, config: Any) -> list[str]:
    """Return the names of what the folder's tokenizer produces."""
    try:
        data = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        names = data.get("model_input_names")
    except (OSError, ValueError):
        names = None
    if isinstance(names, list) and names:
        return [str(name) for name in names]
    types = int(getattr(config, "type_vocab_size", 0) or 0) > 1
    return ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, None) or config


def _largest(config: Any) -> dict[str, int]:
    positions = getattr(config, "max_position_embeddings", None)
    return {"sequence": int(positions)} if isinstance(positions, int) and positions > LENGTH else {}


def _mels(config: Any) -> int:
    return int(getattr(config, "num_mel_bins", 80))


def _frames(config: Any) -> int:
    return 2 * int(getattr(config, "max_source_positions", 1500))
