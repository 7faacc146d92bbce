"""quantize: the matrices of a map are stored in few bits.

    W            ->  Quantized(W)
    Chain(B, A)  ->  Chain(Quantized(B), Quantized(A)), and so on for sums and scales
    Lookup and convolutions stay: their forms have no product that reads packed weights

A site that is quantised already stays as it is.
"""

from typing import Literal

from pydantic import Field

from lrc.formats import FORMATS, FormatField, NumberFormat
from lrc.maps import Composite, Dense, LinearMap, Quantized, rebuilt
from lrc.maps.base import Slot
from lrc.program import Site
from lrc.run import Keep, PassOptions, Rewrite, Statistics, site_pass


class Quantize(PassOptions):
    """Store weights in few bits."""

    type: Literal["quantize"] = "quantize"
    format: FormatField = Field(
        default=FORMATS["nf4"], description="nf2, nf3, nf4, nf8, int4, int8, or a mapping with `type: nf` or `type: int`."
    )


@site_pass(Quantize)
def quantize(site: Site, statistics: Statistics, options: Quantize) -> Rewrite | Keep:
    """Every matrix of the site's map -> the nearest one in the format; biases stay."""
    made = in_few_bits(site.map, options.format)
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


def in_few_bits(made: LinearMap, form: NumberFormat) -> LinearMap | None:
    """Return a map with its matrices in a format, or None where it has none."""
    if isinstance(made, Dense):
        return Quantized.of(made.weight, form, made.bias)
    if not isinstance(made, Composite):
        return None
    parts: list[Slot] = []
    for slot in made.slots:
        new = in_few_bits(slot, form) if isinstance(slot, LinearMap) else Quantized.of(slot, form)
        parts.append(slot if new is None else new)
    return None if all(new is old for new, old in zip(parts, made.slots, strict=True)) else rebuilt(made, parts)
