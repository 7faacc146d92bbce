"""The fresh process: opens one artifact, runs it on stored inputs, stores the outputs. It imports what the artifact needs.

python -m lrc.verify.worker FOLDER    # reads job.json and inputs.safetensors, writes outputs.safetensors
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open


def main(folder: Path) -> None:
    """Do the job that `folder` describes."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    module, _, name = job["opens"].partition(":")
    runner = getattr(importlib.import_module(module), name)(Path(job["path"]))
    framework = "pt" if "torch" in sys.modules else "numpy"
    outputs: dict[str, Any] = {}
    with safe_open(folder / "inputs.safetensors", framework=framework) as file:
        for case in range(job["cases"]):
            keys = [key for key in file.keys() if key.startswith(f"{case}/")]  # noqa: SIM118 - not a mapping
            inputs = {key.partition("/")[2]: file.get_tensor(key) for key in keys}
            outputs |= {f"{case}/{name}": value for name, value in runner(**inputs).items()}
    store(outputs, folder / "outputs.safetensors", framework)


def store(outputs: dict[str, Any], path: Path, framework: str) -> None:
    """Write tensors or arrays."""
    if framework == "pt":
        from safetensors.torch import save_file

        save_file({name: value.detach().cpu().clone().contiguous() for name, value in outputs.items()}, path)
    else:
        from safetensors.numpy import save_file as save_arrays

        save_arrays(outputs, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
