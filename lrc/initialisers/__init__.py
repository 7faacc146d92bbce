"""Initialisers: where the factors of an adapter start. Numerics on tensors alone, one file each."""

from typing import Any

from lrc.initialisers.base import (
    Initial,
    Initialise,
    InitialiserOptions,
    Observer,
    Start,
    initialiser,
    lowrank_svd,
    subtracted,
)
from lrc.initialisers.corda import Corda, corda
from lrc.initialisers.eva import Eva, eva
from lrc.initialisers.gaussian import Gaussian, gaussian
from lrc.initialisers.kaiming import Kaiming, kaiming
from lrc.initialisers.loftq import Loftq, loftq
from lrc.initialisers.lora_ga import LoraGa, lora_ga
from lrc.initialisers.lora_ga_hf import LoraGaHf, lora_ga_hf
from lrc.initialisers.lora_sb import LoraSb, lora_sb
from lrc.initialisers.olora import Olora, olora
from lrc.initialisers.orthogonal import Orthogonal, orthogonal
from lrc.initialisers.pissa import Pissa, pissa
from lrc.initialisers.random_both import RandomBoth, random_both
from lrc.initialisers.svd_weight import SvdWeight, svd_weight
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (
    kaiming,
    gaussian,
    orthogonal,
    random_both,
    pissa,
    olora,
    eva,
    corda,
    loftq,
    lora_ga,
    lora_ga_hf,
    lora_sb,
    svd_weight,
)

__all__ = [
    "BUILTIN",
    "Corda",
    "Eva",
    "Gaussian",
    "Initial",
    "Initialise",
    "InitialiserOptions",
    "Kaiming",
    "Loftq",
    "LoraGa",
    "LoraGaHf",
    "LoraSb",
    "Observer",
    "Olora",
    "Orthogonal",
    "Pissa",
    "RandomBoth",
    "Start",
    "SvdWeight",
    "initialiser",
    "lowrank_svd",
    "subtracted",
]
