"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, written and read as PEFT does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.errors import ModelError, UsageError
from lrc.lower.peft_config import check_config, config_text

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BIAS = "base_layer.bias"
CORE = "lora_latent_mapping.weight"


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as it is on disk: the config as parsed, and the tensors by PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    where: str = ""

    @property
    def kind(self) -> str:
        """`LORA` or `VERA`. Raises UsageError for what is not read."""
        return check_config(self.config, self.where)

    def save(self, folder: Path) -> None:
        """Write both files, the bytes those of PEFT."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(config_text(self.config), encoding="utf-8")


def read_folder(folder: Path) -> PeftFolder:
    """Read a PEFT folder. Raises ModelError for files that are missing or damaged; a pickle is not opened."""
    where = str(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise ModelError(where, expected=f"a PEFT folder with {CONFIG}", got=str(error)) from error
    if not (folder / TENSORS).is_file():
        hint = (
            "Save it with `safe_serialization=True`: a pickle may run code" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise ModelError(where, expected=TENSORS, got="no such file", hint=hint)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{where}/{TENSORS}", message=f"the file is damaged: {error}") from error
    return PeftFolder(config, tensors, where)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every module by their last names: `lora_A.weight` and so on; the prefix may be missing.

    The base's own weight, which PEFT stores beside adapters of embeddings, is left out. The core between the factors that the
    authors of LoRA-XS and LoRA-SB store, in either of its two spellings, is `CORE`. Raises UsageError for a bias of a module
    that has no adapter.
    """
    found: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(f"_{CORE}"):
            found.setdefault(name.removesuffix(f"_{CORE}").removesuffix(".default"), {})[CORE] = tensor
            continue
        for part in (".lora_", ".vera_lambda"):
            module, mark, last = name.partition(part)
            if mark:
                found.setdefault(module, {})[f"{mark[1:]}{last}"] = tensor
        if name.endswith(".bias") and ".lora_" not in name:
            biases[name.removesuffix(".bias").removesuffix(".base_layer")] = tensor
    for module, bias in biases.items():
        if module not in found:
            raise UsageError(
                module, message="its trained bias cannot be read: it has no adapter", hint="Merge the adapter in PEFT"
            )
        found[module][BIAS] = bias
    return found
