"""Pruning methods: what is dropped, one file each."""

from typing import Any

from lrc.spec.registry import Rule
from lrc_passes.pruners.ranks import RanksPruner
from lrc_passes.pruners.unstructured import unstructured

BUILTIN: tuple[Rule[Any, Any], ...] = (RanksPruner, unstructured)
