"""How well a language model predicts the next token."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.data import Batch, Batches, Request, load_windows
from lrc.data.batches import IGNORED
from lrc.data.load import is_factory, load_batches, load_sliding_windows
from lrc.errors import UsageError
from lrc.verify.metrics.base import MetricOptions, Subject, metric, readouts


class Perplexity(MetricOptions):
    """exp of the mean negative log-likelihood of the next token."""

    type: Literal["perplexity"] = "perplexity"
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Tokens from one window to the next: every token is predicted once, after at least max_length - stride "
        "others. Without it windows do not overlap, the first token of each is not predicted, and the rest at the end is left "
        "out.",
    )
    max_length: int | None = Field(default=None, ge=2, description="Tokens a window; that of `evaluate` without it.")
    higher_is_better: ClassVar[bool] = False

    def check(self, max_length: int, where: str) -> None:
        """Raise UsageError where windows would leave tokens out between them."""
        length = self.max_length or max_length
        if self.stride is not None and self.stride > length:
            raise UsageError(f"{where}.stride", expected=f"at most max_length, {length}", got=str(self.stride))


@metric(Perplexity)
def perplexity(subject: Subject, options: Perplexity) -> float:
    """Return the perplexity per token.

    The file is read as one stream and cut into windows of `max_length` tokens, from the start. With a `stride` below that
    they overlap, and only the tokens of each that no window before it holds are scored; the last one ends with the stream.
    Raises UsageError for a stride of data that comes cut already.
    """
    request = subject.data(options, options.max_length)
    options.check(request.max_length, f"evaluate.{options.type}")
    batches = _windows(request, options.stride)
    total, count = 0.0, 0
    for batch, logits in zip(batches, readouts(subject.runner, batches, "text-generation"), strict=True):
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
        wanted = _labels(batch, overlapping=options.stride is not None)[:, 1:].reshape(-1)
        total += float(F.cross_entropy(predicted, wanted, reduction="sum", ignore_index=IGNORED))
        count += int((wanted != IGNORED).sum())
    return math.exp(total / max(count, 1))


def _windows(request: Request, stride: int | None) -> Batches:
    if not is_factory(request.dataset) and request.path.suffix not in (".npz", ".safetensors"):
        return load_windows(request) if stride in (None, request.max_length) else load_sliding_windows(request, stride)
    if stride is not None:
        raise UsageError(
            "evaluate.perplexity.stride", expected="text, or token ids in one stream", got="batches that are cut already",
            hint="Leave `stride` out, or name a file of text",
        )  # fmt: skip
    return load_batches(request)


def _labels(batch: Batch, *, overlapping: bool) -> Tensor:
    """Return the ids of a batch, (batch, length), with `IGNORED` for those that are padding, or that were scored before."""
    if overlapping and "labels" in batch:
        return batch["labels"]
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return ids.masked_fill(mask == 0, IGNORED)
