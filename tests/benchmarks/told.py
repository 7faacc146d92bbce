"""Texts that the small Llama stories260k wrote itself: data of its own domain to calibrate and to train on."""

import json
from pathlib import Path
from typing import Any

import torch
from common import WORK


def told(folder: Path, texts: int = 384, batch: int = 96) -> list[list[int]]:
    """Return texts of 256 tokens that the model wrote, sampled once at temperature 1."""
    path = WORK / "stories260k_told.json"
    if not path.is_file():
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        new = {"max_new_tokens": 255, "min_new_tokens": 255, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        found: list[list[int]] = []
        for _ in range(0, texts, batch):
            found += model.eval().generate(torch.full((batch, 1), 1), **new).tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return list(json.loads(path.read_text()))
