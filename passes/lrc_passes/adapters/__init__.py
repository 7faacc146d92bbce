"""Adapter methods: each an expression of maps, one file each."""

from lrc_passes.adapters.lora import lora
from lrc_passes.adapters.rslora import rslora

BUILTIN = (lora, rslora)
