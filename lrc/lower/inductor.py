"""torch.compile: how Inductor is set, for compiled modules and packages alike."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.erf import RationalErf
from lrc.lower.unfuse import UnfuseBias
from lrc.program import Program

FILE = "torch_compile/settings.json"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "freezing": {"freezing": True},
    "max_autotune": {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"},
}


class TorchCompileExport(ExportOptions):
    """Settings for `torch.compile`, checked on the result; the code itself is compiled where it runs."""

    format: Literal["torch_compile"] = "torch_compile"
    settings: Literal["default", "freezing", "max_autotune"] = Field(
        default="default", description="How Inductor compiles; docs/measured.md says what each one gains."
    )
    dynamic: bool = Field(default=True, description="One compilation for all shapes.")
    opens: ClassVar[str] = "lrc.lower.inductor:open_settings"
    artifact: ClassVar[str] = FILE


@exporter(TorchCompileExport)
def export_torch_compile(program: Program, folder: Path, options: TorchCompileExport) -> Written:
    """Write the settings beside the Hugging Face folder or program that they compile. Raises LowerError without a compiler."""
    need_compiler(FILE)
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"options": SETTINGS[options.settings], "dynamic": options.dynamic}
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return Written(FILE, ("compiled again in every process that loads it",))


def with_passes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return Inductor options with our passes over its graphs, and with products and sums of kernels on the CPU contracted."""
    return {"post_grad_custom_post_pass": Passes(), "cpp.enable_floating_point_contract_flag": "fast", **options}


class Passes(CustomGraphPass):
    """All our passes over Inductor's graphs, one after the other, for Inductor has room for a single one."""

    passes = (UnfuseBias(), RationalErf())

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """Return what Inductor's cache knows the passes by."""
        return tuple(each.uuid() for each in self.passes)


class CompiledRunner:
    """A module under torch.compile as a runner."""

    def __init__(self, module: nn.Module, options: Mapping[str, Any], dynamic: bool) -> None:
        self.module = torch.compile(module, dynamic=dynamic, options=with_passes(options))

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run without gradients."""
        from lrc.lower.hf_folder import named_tensors

        with torch.no_grad():
            return named_tensors(self.module(**inputs))


def open_settings(path: Path) -> CompiledRunner:
    """Compile the model in the folder above, as the settings say."""
    from lrc.lower.load import load

    settings = json.loads(path.read_text(encoding="utf-8"))
    return CompiledRunner(load(path.parent.parent), settings["options"], settings["dynamic"])


def compiler() -> str | None:
    """Return the C++ compiler that Inductor would use, or None."""
    wanted = os.environ.get("CXX", "")
    return next((path for name in (wanted, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def need_compiler(where: str) -> None:
    """Raise LowerError when there is no C++ compiler."""
    if compiler() is None:
        raise LowerError(where, message="Inductor needs a C++ compiler", hint="Install g++, or set CXX; `lrc doctor` checks it")
