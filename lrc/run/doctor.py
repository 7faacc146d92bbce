"""Is this machine fit for the job? Packages, the compiler that Inductor needs, CPU features, free disk."""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from typing import Any

CORE = (
    "torch",
    "pydantic",
    "PyYAML",
    "rich",
    "typer",
    "safetensors",
    "numpy",
    "scipy",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
EXTRAS = {"transformers": "hf", "tokenizers": "hf"}
Row = dict[str, Any]


def examine() -> list[Row]:
    """Return a row per check: what, found, ok, needed (whether the main job fails without it), remedy."""
    rows = [_package(name, needed=True, remedy=f"pip install {name}") for name in CORE]
    rows += [_package(name, needed=False, remedy=f"pip install 'lrc-compiler[{extra}]'") for name, extra in EXTRAS.items()]
    return rows + [check() for check in (_compiler, _cpu, _gpu, _disk)]


def _row(what: str, found: str, *, ok: bool, needed: bool = False, remedy: str = "") -> Row:
    return {"what": what, "found": found, "ok": ok, "needed": needed, "remedy": "" if ok else remedy}


def _package(name: str, *, needed: bool, remedy: str) -> Row:
    try:
        return _row(name, importlib.metadata.version(name), ok=True, needed=needed)
    except importlib.metadata.PackageNotFoundError:
        return _row(name, "not installed", ok=False, needed=needed, remedy=remedy)


def _compiler() -> Row:
    from lrc.lower.inductor import compiler

    path = compiler()
    remedy = "install g++ or clang++ (needed by the exports aoti and torch_compile), or set CXX"
    return _row("C++ compiler for Inductor", path or "none", ok=path is not None, remedy=remedy)


def _guarded(find: Callable[[], str]) -> str:
    try:
        return find()
    except ImportError:
        return "torch is not installed"


def _cpu() -> Row:
    def find() -> str:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads; AOTInductor packages are bound to it"

    return _row("CPU features", _guarded(find), ok=True)


def _gpu() -> Row:
    def find() -> str:
        import torch

        from lrc.kernels import refusal

        if not torch.cuda.is_available():
            return "none (everything runs on the CPU)"
        reason = refusal()
        return f"{torch.cuda.get_device_name()}; Triton kernels: {'yes' if reason is None else f'no, {reason}'}"

    return _row("GPU", _guarded(find), ok=True)


def _disk() -> Row:
    free = shutil.disk_usage(".").free
    return _row("free disk here", f"{free / 1e9:.1f} GB", ok=free > 1e9, remedy="free some space: artifacts need it")
