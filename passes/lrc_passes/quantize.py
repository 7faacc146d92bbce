"""quantize: the matrices of a map are stored in few bits.

    W            ->  Quantized(W)
    Chain(B, A)  ->  Chain(Quantized(B), Quantized(A)), and so on for sums and scales
    Lookup and convolutions stay: their forms have no product that reads packed weights

A site that is quantised already stays as it is, and so does a weight that something else reads too, unless `tied: untie`.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.formats import FORMATS, FormatField, NumberFormat
from lrc.maps import Chain, Composite, Dense, LinearMap, Quantized, rebuilt
from lrc.maps.base import Slot, slot_exact
from lrc.program import Site
from lrc.run import Keep, Rewrite, Statistics, StoredOptions, site_pass
from lrc.solvers import Need
from lrc.solvers.checks import check_finite
from lrc.solvers.feedback import Feedback

DAMPING = 0.01  # of the mean of the diagonal, as GPTQ has it


class Quantize(StoredOptions):
    """Store weights in few bits."""

    type: Literal["quantize"] = "quantize"
    format: FormatField = Field(
        default=FORMATS["nf4"], description="nf2, nf3, nf4, nf8, int4, int8, or a mapping with `type: nf` or `type: int`."
    )
    rounding: Literal["nearest", "feedback"] = Field(
        default="nearest",
        description="nearest: each number alone. feedback: scales are fitted, and every column makes up for the errors before "
        "it on the calibration inputs (GPTQ).",
    )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # it depends on an option
        """The inputs' second moment for `rounding: feedback`."""
        return frozenset({Need.INPUTS}) if self.rounding == "feedback" else frozenset()


@site_pass(Quantize)
def quantize(site: Site, statistics: Statistics, options: Quantize) -> Rewrite | Keep:
    """Every matrix of the site's map -> one in the format, the nearest or that with error feedback; biases stay.

    Raises SolverError for weights that are not finite, of which one would spoil the scales of all.
    """
    for name, tensor in site.map.named_parameters():
        check_finite(f"{site.fqn}: {name}", tensor.detach())
    gram = damped(statistics.moments.gram) if options.rounding == "feedback" else None
    made = in_few_bits(site.map, options.format, gram)
    if made is None:
        return Keep(f"{site.map!r} has no matrix that can be stored in {options.format.name}")
    weight, rounded = site.map.dense().weight.double(), made.dense().weight.double()
    whole = float(weight.norm())
    error = float((weight - rounded).norm()) / whole if whole else 0.0
    if made.cost().bytes >= site.map.cost().bytes:
        return Keep(
            f"{options.format.name} needs no fewer bytes: {made.cost().bytes}, what stands there {site.map.cost().bytes}"
        )
    return Rewrite(made, (f"{options.format.name}, {options.format.bits_per_weight():.3f} bits a number: error {error:.2%}",))


def damped(gram: Tensor | None) -> Tensor | None:
    """Return the second moment of the inputs with some of its mean on the diagonal; None where it has no other entries."""
    if gram is None or gram.ndim == 1 or not float(gram.diagonal().mean()) > 0:
        return None
    return gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)


def in_few_bits(made: LinearMap, form: NumberFormat, gram: Tensor | None = None) -> LinearMap | None:
    """Return a map with its matrices in a format, or None where it has none.

    gram: the damped second moment of its inputs, for error feedback. In a chain each matrix has that of what comes before it.
    """
    if isinstance(made, Dense):
        return in_format(made.weight, form, gram, made.bias)
    if not isinstance(made, Composite):
        return None
    parts: list[Slot] = []
    for slot in reversed(made.slots):  # those of a chain are applied from the last on
        new = in_few_bits(slot, form, gram) if isinstance(slot, LinearMap) else in_format(slot, form, gram)
        parts.append(slot if new is None else new)
        if gram is not None and isinstance(made, Chain):
            weight = slot_exact(parts[-1]).weight
            gram = damped(weight @ gram @ weight.T)
    parts.reverse()
    return None if all(new is old for new, old in zip(parts, made.slots, strict=True)) else rebuilt(made, parts)


def in_format(weight: Tensor, form: NumberFormat, gram: Tensor | None, bias: Tensor | None = None) -> Quantized:
    """Return a matrix in a format, rounded with feedback where a Gram matrix of its inputs is given."""
    if gram is None:
        return Quantized.of(weight, form, bias)
    encoded = Feedback(gram).encode(weight.detach(), form)
    return Quantized(encoded, (weight.shape[0], weight.shape[1]), form, weight.dtype, bias)
