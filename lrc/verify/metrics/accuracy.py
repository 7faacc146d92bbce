"""How often a classifier is right."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from lrc.data import load_batches
from lrc.data.files import need_columns, read_rows, text_column
from lrc.data.load import is_factory
from lrc.errors import DataError
from lrc.verify.metrics.base import MetricOptions, Subject, embeddings, folder_of, metric, readouts


class Accuracy(MetricOptions):
    """Share of samples whose largest logit is that of their label."""

    type: Literal["accuracy"] = "accuracy"
    label_column: str = Field(default="label", description="Of text data: a class index, or a name out of config.json.")


@metric(Accuracy)
def accuracy(subject: Subject, options: Accuracy) -> float:
    """Return the accuracy, 0 … 1. Data: rows with text and label, or arrays (or batches) with `labels`.

    Raises DataError for a label that is neither a class index nor a name of a class.
    """
    request = subject.data(options)
    if is_factory(request.dataset) or request.path.suffix in (".npz", ".safetensors"):
        batches = load_batches(request)
        right, count = 0, 0
        for batch, logits in zip(batches, readouts(subject.runner, batches, request.task), strict=True):
            if "labels" not in batch:
                raise DataError(str(request.path), expected="an array `labels`", got=", ".join(batch))
            right += int((logits.argmax(-1) == batch["labels"]).sum())
            count += batch["labels"].numel()
        return right / max(count, 1)
    rows = read_rows(request.path, ("text", options.label_column))[: request.samples]
    column = text_column(rows, request.path, request.text_column)
    need_columns(rows, request.path, (column, options.label_column))
    names = class_names(subject)
    wanted = torch.tensor([label_of(row[options.label_column], names, str(request.path)) for row in rows])
    logits = embeddings(subject.runner, [str(row[column]) for row in rows], request)
    return float((logits.argmax(-1) == wanted).double().mean())


def class_names(subject: Subject) -> Mapping[str, int]:
    """Return the classes that the model's config names."""
    try:
        config = json.loads((folder_of(subject.request) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): int(index) for name, index in (config.get("label2id") or {}).items()}


def label_of(value: Any, names: Mapping[str, int], where: str) -> int:
    """Return a label as a class index. Raises DataError."""
    if str(value) in names:
        return names[str(value)]
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            where, expected=f"a class index, or one of {', '.join(names) or 'no names'}", got=repr(value)
        ) from error
