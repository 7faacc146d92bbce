"""What is sent back through the model: the gradient of a loss, summed over tokens, at the model's output of interest."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lrc.data.batches import IGNORED
from lrc.errors import DataError, UsageError

Fisher = Literal["sampled", "labels", "outputs"]
ROWS = 512  # rows of logits that are worked on at a time


def has_classes(task: str | None) -> bool:
    """Say whether the output of interest of a task is the logits of a softmax."""
    words = {"text-generation", "text2text-generation", "fill-mask"}
    return task is not None and (task in words or task.endswith("classification"))


def cotangent(
    output: Tensor, inputs: Mapping[str, Tensor], fisher: Fisher, task: str | None, generator: torch.Generator
) -> Tensor:
    """Return dL/d(output) of the summed loss, in the shape and dtype of `output`; zero at padded positions.

    outputs: standard normal (Gauss-Newton of a squared error). sampled: cross-entropy to labels drawn from the model's own
    softmax; a task without a softmax has a Gaussian around its output as its own distribution, which makes it `outputs`.
    labels: cross-entropy to the next token, or to the batch's `labels`.
    Source: Martens & Grosse (2015), arXiv:1503.05671, section 5: true and empirical Fisher.
    """
    output = output.detach()
    if fisher == "outputs" or (fisher == "sampled" and not has_classes(task)):
        sent = torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output)
        return without_padding(sent, inputs)
    if not has_classes(task):
        raise UsageError("solver.fisher", expected="`outputs` or `sampled`: the task has no labels", got=f"`labels` for {task}")
    logits = output.reshape(-1, output.shape[-1])
    labels = labels_of(output, inputs, task) if fisher == "labels" else None
    draws = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    sent = torch.empty_like(logits)
    for start in range(0, len(logits), ROWS):
        part = slice(start, start + ROWS)
        sent[part] = _softmax_gradient(logits[part], None if labels is None else labels[part], draws[part])
    return without_padding(sent.reshape(output.shape), inputs)


def _softmax_gradient(logits: Tensor, labels: Tensor | None, draws: Tensor) -> Tensor:
    """Return softmax(logits) minus the one-hot labels, (rows, classes); labels are drawn by `draws` in [0, 1) if None."""
    sent = logits.float().softmax(-1)
    if labels is None:
        levels = sent.cumsum(-1)
        labels = torch.searchsorted(levels, draws.to(levels)[:, None] * levels[:, -1:], right=True)[:, 0]
        labels = labels.clamp_(max=logits.shape[-1] - 1)  # a product may round up to the last level itself
    counted = labels != IGNORED
    rows = counted.nonzero()[:, 0]
    sent[rows, labels[rows]] -= 1
    return sent.mul_(counted[:, None]).to(logits.dtype)


def labels_of(output: Tensor, inputs: Mapping[str, Tensor], task: str | None) -> Tensor:
    """Return one label for every row of the logits, flat; `IGNORED` where there is none."""
    labels = inputs.get("labels")
    if task == "text-generation":
        ids = inputs["input_ids"] if labels is None else labels
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        mask = inputs.get("attention_mask")
        if mask is not None:
            labels[:, :-1].masked_fill_(mask[:, 1:] == 0, IGNORED)
    if labels is None:
        raise DataError("calibration", expected=f"`labels` for `fisher: labels` and the task {task}", got=", ".join(inputs))
    if labels.numel() != output[..., 0].numel():
        raise DataError("calibration", expected=f"labels of shape {tuple(output.shape[:-1])}", got=f"{tuple(labels.shape)}")
    return labels.reshape(-1)


def without_padding(sent: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Zero the rows of padded positions, where the output has one row a token."""
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if mask is not None and sent.ndim == 3 and mask.shape == sent.shape[:2]:
        sent.mul_(mask[..., None].to(sent.dtype))
    return sent
