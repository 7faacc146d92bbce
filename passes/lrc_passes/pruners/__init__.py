"""Pruning methods: what is dropped, one file each."""

from lrc_passes.pruners.structured import StructuredPruner

BUILTIN = (StructuredPruner,)
