"""The exported program as a file: the artifact of models that have no Hugging Face folder."""

import zipfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.program import Program


class Pt2Export(ExportOptions):
    """A program that `torch.export.load` reads, without our package."""

    format: Literal["pt2"] = "pt2"
    opens: ClassVar[str] = "lrc.lower.pt2:open_pt2"
    artifact: ClassVar[str] = "program.pt2"


@exporter(Pt2Export)
def export_pt2(program: Program, folder: Path, options: Pt2Export) -> Written:
    """Write `program.pt2`: flat named inputs, a mapping of named tensors as output, no paths or stack traces."""
    exported = program.export()
    for node in exported.graph.nodes:
        for key in ("stack_trace", "from_node", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    path = folder / "program.pt2"
    torch.export.save(exported, path)
    return Written("program.pt2")


class Pt2Runner:
    """A saved program as a runner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.module = torch.export.load(path).module(check_guards=False)

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run without gradients."""
        with torch.no_grad():
            found: dict[str, Tensor] = self.module(**inputs)
        return found


def open_pt2(path: Path) -> Pt2Runner:
    """Open the artifact of `format: pt2`. Raises LowerError for a file that holds code or is no program."""
    if not zipfile.is_zipfile(path):
        raise LowerError(str(path), expected="a program saved by torch.export.save", got="another kind of file")
    return Pt2Runner(path)
