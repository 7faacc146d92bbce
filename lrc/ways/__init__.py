"""Ways: what a site may become, for the pass `auto` to choose among."""

from typing import Any

from lrc.spec.registry import Rule
from lrc.ways.base import Target, Variant, WayOptions, find, way
from lrc.ways.factorize import FactorizeWay, factorize
from lrc.ways.factors import FactorsWay, quantized_factors
from lrc.ways.prune import PruneWay, prune
from lrc.ways.quantize import QuantizeWay, quantize
from lrc.ways.split import SplitWay, split

BUILTIN: tuple[Rule[Any, Any], ...] = (factorize, quantize, quantized_factors, split, prune)
WAYS_BY_DEFAULT: tuple[WayOptions, ...] = (FactorizeWay(), QuantizeWay(), FactorsWay(), SplitWay(), PruneWay())

__all__ = [
    "BUILTIN",
    "WAYS_BY_DEFAULT",
    "FactorizeWay",
    "FactorsWay",
    "PruneWay",
    "QuantizeWay",
    "SplitWay",
    "Target",
    "Variant",
    "WayOptions",
    "find",
    "way",
]
