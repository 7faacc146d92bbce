"""Pruning methods: what is dropped, one file each."""

from lrc_passes.pruners.ranks import RanksPruner
from lrc_passes.pruners.structured import StructuredPruner
from lrc_passes.pruners.unstructured import unstructured

BUILTIN = (RanksPruner, StructuredPruner, unstructured)
