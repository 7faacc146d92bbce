"""The AOTInductor package: the program compiled to native code for this kind of CPU or GPU."""

import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.inductor import SETTINGS, need_compiler, with_passes
from lrc.lower.pt2 import archive_at
from lrc.program import Program

FILE = "aoti/model.pt2"


class AotiExport(ExportOptions):
    """A package that runs without Python code of the model; it is bound to the CPU features of the machine that made it."""

    format: Literal["aoti"] = "aoti"
    settings: Literal["default", "freezing", "max_autotune"] = Field(
        default="default",
        description="How Inductor compiles; `lrc benchmark` and docs/measured.md say what each one gains.",
    )
    static: bool = Field(default=False, description="Compile for the example's shape alone.")
    opens: ClassVar[str] = "lrc.lower.aoti:open_aoti"
    artifact: ClassVar[str] = FILE


@exporter(AotiExport)
def export_aoti(program: Program, folder: Path, options: AotiExport) -> Written:
    """Write `aoti/model.pt2`. Raises LowerError without a C++ compiler, or when Inductor refuses the program."""
    need_compiler(FILE)
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive_at(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own pickling
            torch._inductor.aoti_compile_and_package(
                program.export(static=options.static),
                package_path=archive,
                inductor_configs=with_passes(SETTINGS[options.settings]),
            )
    except OSError:
        raise
    except Exception as error:  # Inductor raises what its passes raise
        raise LowerError(
            FILE,
            message=f"Inductor refused the program: {str(error).strip().splitlines()[0]}",
            hint="`lrc doctor` checks the compiler",
        ) from error
    notes = (f"bound to {capability()}",)
    return Written(FILE, notes)


def capability() -> str:
    """Return the CPU or GPU features that a package made here needs."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else str(cpu)


class AotiRunner:
    """A package as a runner; inputs are taken by name."""

    def __init__(self, path: Path) -> None:
        try:
            self.package: Any = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise LowerError(
                str(path), expected="an AOTInductor package for this machine", got=str(error).splitlines()[0]
            ) from error

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run once."""
        with torch.no_grad():
            found: dict[str, Tensor] = self.package(**inputs)
        return found


def open_aoti(path: Path) -> AotiRunner:
    """Open the artifact of `format: aoti`. It is native code: only open what you made."""
    return AotiRunner(path)
