"""Adapter methods: each an expression of maps, one file each."""

from lrc_passes.adapters.colora import colora
from lrc_passes.adapters.compacter import compacter
from lrc_passes.adapters.dora import dora
from lrc_passes.adapters.flora import flora
from lrc_passes.adapters.hydra import hydra
from lrc_passes.adapters.loldu import loldu
from lrc_passes.adapters.lora import lora
from lrc_passes.adapters.lora_xs import lora_xs
from lrc_passes.adapters.plp import plp
from lrc_passes.adapters.rslora import rslora
from lrc_passes.adapters.sora import sora
from lrc_passes.adapters.vera import vera

BUILTIN = (lora, rslora, dora, vera, hydra, lora_xs, loldu, sora, flora, colora, compacter, plp)
