"""The weight in few bits, by plain rounding or with error feedback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.formats import FORMATS, FormatField, NormalFloat, NumberFormat
from lrc.maps import LinearMap, Quantized
from lrc.solvers.feedback import Feedback
from lrc.ways.base import Target, Variant, WayOptions, way

LADDER: tuple[NumberFormat, ...] = (
    NormalFloat(bits=2, block=32),
    NormalFloat(bits=3, block=32),
    *(FORMATS[name] for name in ("nf2", "nf3", "nf4", "nf8", "int4", "int8")),
)


class QuantizeWay(WayOptions):
    """Weights in few bits."""

    type: Literal["quantize"] = "quantize"
    formats: list[FormatField] = Field(default=list(LADDER), min_length=1, description="The formats to choose among.")
    rounding: Literal["nearest", "feedback"] = Field(
        default="feedback", description="Each number alone, or every column making up for the errors before it (GPTQ)."
    )

    def variants(self, out_features: int, in_features: int) -> Sequence["Rounded"]:
        """Return one variant a format."""
        return [Rounded(label(form), form, self.rounding) for form in self.formats]


@dataclass(frozen=True)
class Rounded(Variant):
    """A format and how numbers are rounded to it."""

    form: NumberFormat
    rounding: Literal["nearest", "feedback"]


@way(QuantizeWay)
def quantize(target: Target, variant: Rounded) -> LinearMap:
    """Return the weight in the format."""
    if variant.rounding == "nearest":
        return Quantized.of(target.weight.to(target.dtype), variant.form)
    return packed(target.weight, target.feedback, variant.form, target.dtype, target.entries)


def packed(weight: Tensor, feedback: Feedback, form: NumberFormat, dtype: torch.dtype, worth: Tensor) -> Quantized:
    """Return a matrix in a format, rounded with feedback; worth: the weights of `fitted_scales`."""
    shape = (weight.shape[0], weight.shape[1])
    return Quantized(feedback.encode(weight, form, worth), shape, form, dtype)


def label(form: NumberFormat) -> str:
    """Return a short name of a format that tells it from others: `nf4`, `nf4/32` with another block than usual."""
    usual = FORMATS.get(form.name)
    if form == usual:
        return form.name
    others = {k: v for k, v in form.model_dump().items() if usual is None or v != usual.model_dump()[k]}
    return form.name + "".join(f"/{v}" if k == "block" else f"/{k}={v}" for k, v in others.items())
