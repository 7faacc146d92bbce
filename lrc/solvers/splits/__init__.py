"""Splitters: a weight as a low-rank product plus a sparse or a quantised rest."""

from typing import Any

from lrc.solvers.splits.base import QuantizedOptions, SparseOptions, Split, Splitter, SplitterOptions, splitter
from lrc.solvers.splits.godec import GodecSplitter, godec
from lrc.solvers.splits.lq import LoftqSplitter, LqSplitter, loftq, lq
from lrc.solvers.splits.oats import OatsSplitter, oats
from lrc.solvers.splits.pcp import PcpSplitter, pcp
from lrc.solvers.splits.slim import SlimSplitter, slim
from lrc.solvers.splits.sltrain import SltrainSplitter, sltrain
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (lq, loftq, oats, slim, godec, pcp, sltrain)

__all__ = [
    "BUILTIN",
    "GodecSplitter",
    "LoftqSplitter",
    "LqSplitter",
    "OatsSplitter",
    "PcpSplitter",
    "QuantizedOptions",
    "SlimSplitter",
    "SltrainSplitter",
    "SparseOptions",
    "Split",
    "Splitter",
    "SplitterOptions",
    "godec",
    "loftq",
    "lq",
    "oats",
    "pcp",
    "slim",
    "sltrain",
    "splitter",
]
