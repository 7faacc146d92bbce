"""The exported program as a file: the artifact of models that have no Hugging Face folder."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.program import Program
from lrc.program.archive import check_archive

TRACES = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")


class Pt2Export(ExportOptions):
    """A program that `torch.export.load` reads, without our package."""

    format: Literal["pt2"] = "pt2"
    opens: ClassVar[str] = "lrc.lower.pt2:Pt2Runner"
    artifact: ClassVar[str] = "program.pt2"


@exporter(Pt2Export)
def export_pt2(program: Program, folder: Path, options: Pt2Export) -> Written:
    """Write `program.pt2`: flat named inputs, a mapping of named tensors as output, no paths or stack traces."""
    exported = program.export()
    for node in exported.graph.nodes:
        for key in TRACES:
            node.meta.pop(key, None)
    folder.mkdir(parents=True, exist_ok=True)
    with archive_at(folder / "program.pt2") as archive:
        torch.export.save(exported, archive)
    return Written("program.pt2")


class Archive(io.RawIOBase):
    """A file that torch writes an archive to. It never raises: torch aborts the whole process where a write does."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Say that the file can be written."""
        return True

    def seekable(self) -> bool:
        """Say that the file has places."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self.file.tell()

    def write(self, data: Any) -> int:
        """Write, or keep the first error of the disk for `archive_at`."""
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


@contextmanager
def archive_at(path: Path) -> Iterator[IO[bytes]]:
    """Give a file for torch to write an archive to. Raises OSError at the end when the disk did not take it."""
    with path.open("wb") as file:
        archive = Archive(file)
        yield cast(IO[bytes], archive)  # torch asks for more of it than it uses
        if archive.error is not None:
            raise archive.error


class Pt2Runner:
    """A saved program as a runner. Raises LowerError for a file that holds code, or is no program."""

    def __init__(self, path: Path) -> None:
        check_archive(path)
        try:
            self.module = torch.export.load(path).module(check_guards=False)
        except Exception as error:  # torch raises many kinds here, and the file is not ours
            raise LowerError(
                str(path), expected="a program saved by torch.export.save", got=str(error).splitlines()[0]
            ) from error
        if any(node.target == torch.ops.higher_order.scan for node in self.module.graph.nodes):
            self.module.requires_grad_(False)  # torch would compile the gradient of a loop, with a C++ compiler, to run it

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run without gradients."""
        with torch.no_grad():
            found: dict[str, Tensor] = self.module(**inputs)
        return found


def is_package(path: Path) -> bool:
    """Say whether a .pt2 file is an AOTInductor package: native code, not a graph."""
    with zipfile.ZipFile(path) as archive:
        return any("aotinductor" in name for name in archive.namelist())
