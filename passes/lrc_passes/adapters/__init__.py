"""Adapter methods: each an expression of maps, one file each."""

from lrc_passes.adapters.dora import dora
from lrc_passes.adapters.lora import lora
from lrc_passes.adapters.rslora import rslora
from lrc_passes.adapters.vera import vera

BUILTIN = (dora, lora, rslora, vera)
