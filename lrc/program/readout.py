"""The output that a loss would look at: what gradients start from, and what quality is measured on."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from lrc.errors import CaptureError

PREFERRED = ("logits", "last_hidden_state", "image_embeds", "text_embeds", "output")


def readout(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], task: str | None) -> Tensor:
    """Return the output of interest of a task.

    sentence-similarity: the normalised mean over unpadded tokens of the last hidden state, (batch, features). All others:
    the first of `logits`, `last_hidden_state`, …, or the first floating output. Raises CaptureError when there is none.
    """
    if task == "sentence-similarity" and "last_hidden_state" in outputs:
        return sentence_embedding(outputs["last_hidden_state"], inputs.get("attention_mask"))
    floating = {name: value for name, value in outputs.items() if value.is_floating_point()}
    for name in PREFERRED:
        if name in floating:
            return floating[name]
    if not floating:
        raise CaptureError("outputs", expected="a floating output", got=", ".join(outputs) or "none")
    return next(iter(floating.values()))


def sentence_embedding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over unpadded tokens of (batch, sequence, features), with length 1: (batch, features)."""
    if mask is None:
        return F.normalize(hidden.mean(1), dim=-1)
    weight = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)
