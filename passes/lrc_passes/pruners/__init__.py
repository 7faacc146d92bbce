"""Pruning methods: what is dropped, one file each."""

from typing import Any

from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = ()
