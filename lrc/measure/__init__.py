"""Measuring: statistics of sites and latency on this device, computed once and cached by content."""

from lrc.measure.cache import Cache, digest
from lrc.measure.collect import collect
from lrc.measure.contribution import contributions, site_scores, write_scores
from lrc.measure.latency import Latency, Ratio, joined, measure_latency, ratio_to, speedup
from lrc.measure.lockstep import Lockstep
from lrc.measure.spectrum import spectrum, stable_rank

__all__ = [
    "Cache",
    "Latency",
    "Lockstep",
    "Ratio",
    "collect",
    "contributions",
    "digest",
    "joined",
    "measure_latency",
    "ratio_to",
    "site_scores",
    "spectrum",
    "speedup",
    "stable_rank",
    "write_scores",
]
