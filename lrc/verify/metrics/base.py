"""What a metric is given: something to run, the same thing before compression, and the data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from lrc.data import Batches, Request
from lrc.data.batches import of_equal_length
from lrc.data.text import load_tokenizer, tokenize
from lrc.errors import UsageError
from lrc.lower.base import Runner
from lrc.program.readout import readout
from lrc.spec.base import Tagged
from lrc.spec.registry import METRICS, Rule
from lrc.verify.runner import run

P = ParamSpec("P")
R = TypeVar("R")


class MetricOptions(Tagged):
    """Options of a metric.

    higher_is_better: which way is good, for gates. relative: compares with the original model by itself.
    """

    dataset: str | None = Field(default=None, description="Data of this metric; that of `evaluate` without it.")
    higher_is_better: ClassVar[bool] = True
    relative: ClassVar[bool] = False

    def check(self, max_length: int, where: str) -> None:
        """Raise UsageError, before any model is loaded, for options that do not go together. max_length: that of `evaluate`."""


@dataclass(frozen=True)
class Subject:
    """What is judged. original: the model before compression, for metrics that compare with it."""

    runner: Runner
    request: Request
    original: Runner | None = None

    @property
    def task(self) -> str | None:
        """The task of the model."""
        return self.request.task

    def data(self, options: MetricOptions, max_length: int | None = None) -> Request:
        """Return where a metric's data is, and how long a sample is where that is not as `evaluate` says.

        Raises UsageError when neither the metric nor `evaluate` names any data.
        """
        request = self.request if max_length is None else replace(self.request, max_length=max_length)
        if options.dataset is not None:
            return replace(request, dataset=options.dataset)
        if not request.dataset:
            raise UsageError(
                f"evaluate.{options.type}", message="no data", hint="Set `evaluate.dataset`, or the metric's `dataset`"
            )
        return request


def metric(options: type[MetricOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a metric `(subject, options) -> float` to its options model (see `lrc.spec.registry`)."""
    return METRICS.rule(options)


def folder_of(request: Request) -> Path:
    """Return the folder of the tokenizer. Raises UsageError when the model has none."""
    if request.tokenizer is None:
        raise UsageError("evaluate", message="text metrics need a model folder with a tokenizer", hint="Use `type: python`")
    return request.tokenizer


def embeddings(runner: Runner, texts: Sequence[str], request: Request) -> Tensor:
    """Return the output of interest of every text, in order; texts of one length run together, so nothing is padded."""
    unique = list(dict.fromkeys(texts))
    samples = tokenize(load_tokenizer(folder_of(request)), unique, request.inputs, request.max_length)
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i]["input_ids"]), i))
    batches = of_equal_length([samples[i] for i in order], request.batch_size)
    found: dict[str, Tensor] = {}
    waiting = iter(order)
    for value in readouts(runner, batches, request.task):
        for row in value:
            found[unique[next(waiting)]] = row
    return torch.stack([found[text] for text in texts])


def readouts(runner: Runner, batches: Batches, task: str | None) -> Iterator[Tensor]:
    """Yield the output of interest of every batch, in float32 or better."""
    for batch in batches:
        value = readout(run(runner, {k: v for k, v in batch.items() if k != "labels"}), batch, task)
        yield value if value.dtype == torch.float64 else value.float()
