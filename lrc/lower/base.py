"""What an export is: options told apart by `format`, a function that writes files, and how the artifact is opened again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar, runtime_checkable

from lrc.program import Program
from lrc.spec.base import SpecModel
from lrc.spec.registry import EXPORTERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


class ExportOptions(SpecModel):
    """Options of an export.

    opens: `module:callable` that takes the artifact's path and returns a runner; it is imported in a fresh process. Empty for
    an artifact that is no model by itself (an adapter), which its exporter checks.
    artifact: the file that is opened, from the output folder.
    """

    format: Any
    opens: ClassVar[str]
    artifact: ClassVar[str]

    def check(self, program: Program) -> None:
        """Raise LrcError, before any pass runs, when the program cannot be exported so."""


@dataclass(frozen=True)
class Written:
    """What an export has written: the artifact, from the output folder, and what the user should know about it.

    cached: the artifact takes and returns a key-value cache. rounding: the relative error that each product of the artifact
    adds because it rounds its inputs, at most.
    """

    artifact: str
    notes: tuple[str, ...] = ()
    cached: bool = False
    rounding: float = 0.0


class Runner(Protocol):
    """Anything that takes named inputs and returns named outputs: tensors, or arrays."""

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Run once."""


@runtime_checkable
class Generator(Runner, Protocol):
    """A runner that goes on with texts by itself, with a cache."""

    def generate(self, input_ids: Any, attention_mask: Any = None, *, max_new_tokens: int, eos_token_id: Any = None) -> Any:
        """Return the ids (batch, length) with the greedy tokens after them."""


class Export(Protocol):
    """The signature of an exporter."""

    def __call__(self, program: Program, folder: Path, options: ExportOptions) -> Written:
        """Write the program into `folder`."""


def exporter(options: type[ExportOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie an exporter to its options model (see `lrc.spec.registry`)."""
    return EXPORTERS.rule(options)
