"""Language modelling: the next token, and hidden tokens."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.errors import DataError, UsageError
from lrc.train.data import Reads
from lrc.train.objectives.base import IGNORED, ObjectiveOptions, Step, check_classes, logits_of, objective


class CausalLm(ObjectiveOptions):
    """Cross-entropy of the next token."""

    type: Literal["causal_lm"] = "causal_lm"
    reads: ClassVar[Reads] = "windows"


@objective(CausalLm)
def causal_lm(step: Step, options: CausalLm) -> Tensor:
    """Return the mean over predicted tokens; padded ones, and those whose label is -100, are not predicted.

    Raises DataError for labels that are no tokens of the model or not one a token, and for a batch without any.
    """
    ids = step.batch["input_ids"]
    labels = step.batch.get("labels", ids)
    if labels.shape != ids.shape:
        raise DataError("objective causal_lm", expected=f"labels of shape {tuple(ids.shape)}", got=str(tuple(labels.shape)))
    wanted = labels[:, 1:].clone()
    mask = step.batch.get("attention_mask")
    if mask is not None:
        wanted[mask[:, 1:] == 0] = IGNORED
    logits = logits_of(step.student(step.batch), "causal_lm")[:, :-1]
    check_classes(wanted, logits.shape[-1], "causal_lm")
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)


class MaskedLm(ObjectiveOptions):
    """Cross-entropy of hidden tokens."""

    type: Literal["masked_lm"] = "masked_lm"
    share: float = Field(default=0.15, gt=0, lt=1, description="Share of the tokens that are to be predicted.")


@objective(MaskedLm)
def masked_lm(step: Step, options: MaskedLm) -> Tensor:
    """Return the mean over the chosen tokens: 80 % of them are hidden, 10 % replaced by a random one, 10 % left.

    Special tokens and padding are never chosen; where chance chooses nothing, the first token is. Raises DataError for a batch
    of such tokens alone, and UsageError without a mask token.
    Source: Devlin et al. (2019), arXiv:1810.04805, section 3.1.
    """
    if step.mask_id is None:
        raise UsageError("objective masked_lm", expected="a tokenizer with a mask token", got="none")
    ids = step.batch["input_ids"]
    mask = step.batch.get("attention_mask", torch.ones_like(ids))
    words = (mask.cpu() > 0) & ~torch.isin(ids.cpu(), torch.tensor(step.special, dtype=ids.dtype))
    if not bool(words.any()):
        raise DataError(
            "objective masked_lm", expected="something to predict in every batch", got="special tokens and padding alone",
            hint="Leave such samples out, or raise `batch_size`",
        )  # fmt: skip
    draws = torch.rand(3, *ids.shape, generator=step.generator)
    chosen = (draws[0] < options.share) & words
    if not bool(chosen.any()):  # a loss over nothing is not a number
        chosen[tuple(words.nonzero()[0])] = True
    random_ids = (draws[2] * step.vocabulary).long().to(ids.device)
    hidden = torch.where((chosen & (draws[1] < 0.8)).to(ids.device), torch.full_like(ids, step.mask_id), ids)
    hidden = torch.where((chosen & (draws[1] >= 0.9)).to(ids.device), random_ids, hidden)
    logits = logits_of(step.student({**step.batch, "input_ids": hidden}), "masked_lm")
    at = chosen.to(ids.device)
    return F.cross_entropy(logits[at].float(), ids[at])
