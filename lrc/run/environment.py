"""What a run ran on: versions, device, threads."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = (
    "lrc-compiler",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "scipy",
)


def environment() -> dict[str, Any]:
    """Return versions, device and threads; no paths, names or times of the machine."""
    return {
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
