"""Labels: classes, numbers, and how alike two sentences are."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.errors import DataError
from lrc.program.readout import readout
from lrc.train.data import Reads
from lrc.train.objectives.base import IGNORED, ObjectiveOptions, Step, check_classes, logits_of, objective


class Classification(ObjectiveOptions):
    """Cross-entropy of a class."""

    type: Literal["classification"] = "classification"
    reads: ClassVar[Reads] = "labelled"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the label spread over all classes.")


@objective(Classification)
def classification(step: Step, options: Classification) -> Tensor:
    """Return the mean cross-entropy. Raises DataError for labels that are no classes of the model."""
    labels = step.labels("classification")
    logits = logits_of(step.student(step.batch), "classification")
    classes = logits.shape[-1]
    check_classes(labels, classes, "classification")
    return F.cross_entropy(
        logits.reshape(-1, classes).float(), labels.flatten(), ignore_index=IGNORED, label_smoothing=options.label_smoothing
    )


class Regression(ObjectiveOptions):
    """Mean squared error."""

    type: Literal["regression"] = "regression"
    reads: ClassVar[Reads] = "labelled"


@objective(Regression)
def regression(step: Step, options: Regression) -> Tensor:
    """Return the mean squared difference of the output and the labels. Raises DataError for sizes that do not agree."""
    labels = step.labels("regression")
    found = readout(step.student(step.batch), step.batch, step.task)
    if found.numel() != labels.numel():
        raise DataError("objective regression", expected=f"labels of shape {tuple(found.shape)}", got=f"{tuple(labels.shape)}")
    return F.mse_loss(found.float(), labels.reshape(found.shape).float())


class Cosine(ObjectiveOptions):
    """Mean squared error of the cosine of two sentences' embeddings."""

    type: Literal["cosine"] = "cosine"
    reads: ClassVar[Reads] = "pairs"
    scale: float = Field(default=5.0, gt=0, description="The score that stands for a cosine of 1.")


@objective(Cosine)
def cosine(step: Step, options: Cosine) -> Tensor:
    """Return the mean squared difference of cosine and score / scale. The batch holds the first sentences, then the second."""
    scores = step.labels("cosine")
    found = readout(step.student(step.batch), step.batch, step.task)
    if len(found) != 2 * len(scores):
        raise DataError("objective cosine", expected="pairs of sentences with a score", got="single texts")
    left, right = found.float().chunk(2)
    return F.mse_loss(F.cosine_similarity(left, right, dim=-1), scores.to(left) / options.scale)
