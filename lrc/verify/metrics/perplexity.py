"""How well a language model predicts the next token."""

import math
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from lrc.data import load_windows
from lrc.data.load import is_factory, load_batches
from lrc.verify.metrics.base import MetricOptions, Subject, metric, readouts


class Perplexity(MetricOptions):
    """exp of the mean negative log-likelihood of the next token, over windows without overlap."""

    type: Literal["perplexity"] = "perplexity"
    higher_is_better: ClassVar[bool] = False


@metric(Perplexity)
def perplexity(subject: Subject, options: Perplexity) -> float:
    """Return the perplexity per token.

    The file is read as one stream and cut into windows of `max_length` tokens, from the start; the first token of a window
    is not predicted.
    """
    request = subject.data(options)
    arrays = is_factory(request.dataset) or request.path.suffix in (".npz", ".safetensors")
    batches = load_batches(request) if arrays else load_windows(request)
    total, count = 0.0, 0
    for batch, logits in zip(batches, readouts(subject.runner, batches, "text-generation"), strict=True):
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
        wanted = batch["input_ids"][:, 1:].reshape(-1)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].reshape(-1).bool()
        total += float(F.cross_entropy(predicted[mask], wanted[mask], reduction="sum"))
        count += int(mask.sum())
    return math.exp(total / max(count, 1))
