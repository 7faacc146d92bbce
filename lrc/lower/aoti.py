"""The AOTInductor package: the program compiled to native code for this kind of CPU or GPU."""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import LowerError, UsageError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.inductor import SETTINGS, need_compiler, with_passes
from lrc.lower.pt2 import archive_at
from lrc.program import Program

FILE = "aoti/model.pt2"
SIZES, TYPES = "LRC_INPUT_SIZES", "LRC_INPUT_TYPES"  # keys of the package's metadata


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
                inductor_configs=with_passes(SETTINGS[options.settings])
                | {"aot_inductor.metadata": metadata(program, options)},
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


def metadata(program: Program, options: AotiExport) -> dict[str, str]:
    """Return what a package says of its inputs, for `AotiRunner` to check them."""
    types = {name: str(example.dtype).removeprefix("torch.") for name, example in program.inputs.examples.items()}
    return {SIZES: json.dumps(program.inputs.limits(static=options.static)), TYPES: json.dumps(types)}


class AotiRunner:
    """A package as a runner; inputs are taken by name, and cast to the type that it was compiled for.

    Native code checks nothing: sizes that it was not compiled for would give wrong numbers or end the process. So they are
    checked here, in packages that `export_aoti` wrote. Raises UsageError for an input that is missing or of such a size.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.package: Any = torch._inductor.aoti_load_package(str(path))
            told = self.package.get_metadata()
        except Exception as error:
            raise LowerError(
                str(path), expected="an AOTInductor package for this machine", got=str(error).splitlines()[0]
            ) from error
        self.sizes = json.loads(told.get(SIZES, "{}"))
        self.types = {name: getattr(torch, dtype) for name, dtype in json.loads(told.get(TYPES, "{}")).items()}

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run once."""
        if self.sizes:
            inputs = self._checked(inputs)
        with torch.no_grad():
            found: dict[str, Tensor] = self.package(**inputs)
        return found

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        known: dict[str, int] = {}
        made = {}
        for name, sizes in self.sizes.items():
            value = inputs.get(name)
            if value is None:
                raise UsageError(
                    f"{self.name}: {name}", expected="inputs " + ", ".join(self.sizes), got=", ".join(inputs) or "none"
                )
            if value.ndim != len(sizes) or not all(map(partial(fits, known), value.shape, sizes)):
                raise UsageError(
                    f"{self.name}: {name}",
                    expected=f"[{', '.join(map(in_words, sizes))}], which the package was compiled for",
                    got=str(list(value.shape)),
                )
            made[name] = value.to(self.types[name])
        return made


def fits(known: dict[str, int], size: int, wanted: int | list[Any]) -> bool:
    """Say whether a size is the wanted one, or in the range of a dynamic one and equal to the others of its name."""
    if isinstance(wanted, int):
        return size == wanted
    name, largest = wanted
    return 1 <= size == known.setdefault(name, size) and (largest is None or size <= largest)


def in_words(wanted: int | list[Any]) -> str:
    """Return a size as people read it: `2`, `batch`, `sequence <= 512`."""
    if isinstance(wanted, int):
        return str(wanted)
    name, largest = wanted
    return str(name) if largest is None else f"{name} <= {largest}"


def open_aoti(path: Path) -> AotiRunner:
    """Open the artifact of `format: aoti`. It is native code: only open what you made."""
    return AotiRunner(path)
