"""Learning from the model as it was before the passes: its outputs, and what its layers gave. No labels are needed."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.measure.cotangents import has_classes
from lrc.program.readout import PREFERRED, readout
from lrc.train.data import Reads
from lrc.train.objectives.base import ObjectiveOptions, Outputs, Step, objective

TINY = 1e-12


class Distillation(ObjectiveOptions):
    """Follow the outputs of the uncompressed model."""

    type: Literal["distillation"] = "distillation"
    temperature: float = Field(default=1.0, gt=0, description="Of both softmaxes, where the output has classes.")
    hidden: float = Field(
        default=0.0, ge=0, description="Weight of the relative error of the last hidden state, token by token."
    )
    teacher: ClassVar[bool] = True


@objective(Distillation)
def distillation(step: Step, options: Distillation) -> Tensor:
    """Return how far the output is from the uncompressed model's, as the mean over a batch.

    Where the task has classes: KL divergence at the temperature, times its square (Hinton et al. 2015, arXiv:1503.02531);
    sentence-similarity: one minus the cosine of the embeddings; else: the squared error over the mean square.
    """
    wanted, found = step.taught(), step.student(step.batch)
    target, output = (readout(o, step.batch, step.task).float() for o in (wanted, found))
    if has_classes(step.task):
        rows = _rows(target, step)
        p, q = (value[rows] if rows is not None else value.flatten(0, -2) for value in (target, output))
        T = options.temperature
        loss = F.kl_div((q / T).log_softmax(-1), (p / T).log_softmax(-1), reduction="batchmean", log_target=True) * T * T
    elif step.task == "sentence-similarity":
        loss = (1 - F.cosine_similarity(output, target, dim=-1)).mean()
    else:
        loss = relative(output, target, _rows(target, step))
    if options.hidden:
        loss = loss + options.hidden * hidden_error(found, wanted, step)
    return loss


def hidden_error(found: Outputs, wanted: Outputs, step: Step) -> Tensor:
    """Return the relative squared error of the hidden state (or the first output that is known) over unpadded tokens."""
    name = next(n for n in ("last_hidden_state", *PREFERRED, *wanted) if n in wanted)
    return relative(found[name].float(), wanted[name].float(), _rows(wanted[name], step))


def relative(found: Tensor, wanted: Tensor, rows: Tensor | None) -> Tensor:
    """Return |found - wanted|^2 / |wanted|^2 over the rows asked for."""
    if rows is not None:
        found, wanted = found[rows], wanted[rows]
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=TINY)


def _rows(value: Tensor, step: Step) -> Tensor | None:
    """Return which (batch, token) rows are no padding, where the value has such rows and the batch a mask."""
    mask = step.batch.get("attention_mask")
    if mask is None or value.ndim != 3 or value.shape[:2] != mask.shape:
        return None
    return mask.bool()


class Reconstruction(ObjectiveOptions):
    """Follow the outputs of the trained layers in the uncompressed model."""

    type: Literal["reconstruction"] = "reconstruction"
    teacher: ClassVar[bool] = True
    taps: ClassVar[bool] = True
    reads: ClassVar[Reads] = "lines"


@objective(Reconstruction)
def reconstruction(step: Step, options: Reconstruction) -> Tensor:
    """Return the mean over the trained sites of the relative squared error of their outputs, over unpadded tokens."""
    wanted, found = step.taught(), step.student(step.batch)
    errors = [relative(found[n].float(), wanted[n].float(), _rows(wanted[n], step)) for n in step.tapped]
    return torch.stack(errors).mean()
