"""rslora: LoRA scaled by alpha / sqrt(r), so that higher ranks do not learn more slowly."""

from typing import Literal

from lrc.maps import LinearMap
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.lora import beside


class RsLora(AdapterOptions):
    """Low-rank adaptation, scaled by alpha / sqrt(rank)."""

    type: Literal["rslora"] = "rslora"

    def scaling(self, rank: int, alpha: float | None) -> float:
        """Return alpha / sqrt(rank)."""
        return 1.0 if alpha is None else alpha / rank**0.5


@adapter(RsLora)
def rslora(place: Place, options: RsLora) -> LinearMap:
    """X -> X* + (alpha / sqrt(r)) B A. Source: Kalajdzievski (2023), arXiv:2312.03732, theorem 3.2."""
    return beside(place)
