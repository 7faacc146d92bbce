"""What an objective is given, and how one is registered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from lrc.data import Batch
from lrc.errors import DataError, UsageError
from lrc.spec.base import Tagged
from lrc.spec.registry import OBJECTIVES, Rule
from lrc.train.data import Reads

P = ParamSpec("P")
R = TypeVar("R")
Outputs = Mapping[str, Tensor]
Run = Callable[[Mapping[str, Tensor]], Outputs]
IGNORED = -100  # the label that transformers and torch leave out of a loss


class ObjectiveOptions(Tagged):
    """Options of an objective.

    reads: how text becomes examples. teacher: the model as it was before all passes is run too. taps: the outputs of the
    trained sites are wanted, by the sites' names.
    """

    reads: ClassVar[Reads] = "lines"
    teacher: ClassVar[bool] = False
    taps: ClassVar[bool] = False


@dataclass(frozen=True)
class Step:
    """One batch and what to run it on. student: in training mode; generator: of the step, for random choices.

    mask_id, vocabulary, special: of the tokenizer, where there is one; special ids stand for no text. tapped: names of the
    tapped outputs.
    """

    batch: Batch
    student: Run
    teacher: Run | None = None
    task: str | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    mask_id: int | None = None
    vocabulary: int = 0
    special: tuple[int, ...] = ()
    tapped: tuple[str, ...] = ()
    allow_code: bool = False

    def labels(self, objective: str) -> Tensor:
        """Return the labels of the batch. Raises DataError when the data has none."""
        if "labels" not in self.batch:
            raise DataError(
                f"objective {objective}", expected="data with labels", got=", ".join(self.batch),
                hint="Give a column of labels (`data.label_column`), or arrays with one called `labels`",
            )  # fmt: skip
        return self.batch["labels"]

    def taught(self) -> Outputs:
        """Return the outputs of the uncompressed model, without gradients."""
        if self.teacher is None:
            raise UsageError("objective", message="there is no model before the passes to learn from")
        with torch.no_grad():
            return self.teacher(self.batch)


def objective(options: type[ObjectiveOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a function `(step, options) -> mean loss of the batch` to its options model (see `lrc.spec.registry`)."""
    return OBJECTIVES.rule(options)


def check_classes(labels: Tensor, classes: int, name: str) -> None:
    """Raise DataError for labels that are no classes of a model, and where no label is left to learn from."""
    left_out = labels == IGNORED
    if labels.is_floating_point() or bool((((labels < 0) | (labels >= classes)) & ~left_out).any()):
        found = sorted(set(labels.flatten().tolist()))
        wrong = [v for v in found if not (v == IGNORED or (0 <= v < classes and v == int(v)))]
        raise DataError(
            f"objective {name}", expected=f"whole labels 0 to {classes - 1}, the classes of the model",
            got=", ".join(map(str, wrong[:5] or found[:5])), hint="Number the labels from 0, or give the model more classes",
        )  # fmt: skip
    if bool(left_out.all()):
        raise DataError(
            f"objective {name}", expected="something to predict in every batch",
            got=f"labels that are all {IGNORED}, or padding" if labels.numel() else "none",
            hint="Leave such samples out, or raise `batch_size` or `max_length`",
        )  # fmt: skip


def logits_of(outputs: Outputs, name: str) -> Tensor:
    """Return the logits. Raises UsageError for a model without any."""
    if "logits" in outputs:
        return outputs["logits"]
    floating = [value for value in outputs.values() if value.is_floating_point()]
    if len(outputs) == 1 and floating:
        return floating[0]
    raise UsageError(f"objective {name}", expected="a model that returns `logits`", got=", ".join(outputs))
