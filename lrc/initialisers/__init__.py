"""Initialisers: where the factors of an adapter start. Numerics on tensors alone, one file each."""

from typing import Any

from lrc.initialisers.base import Initial, Initialise, InitialiserOptions, Start, initialiser, subtracted
from lrc.initialisers.gaussian import Gaussian, gaussian
from lrc.initialisers.kaiming import Kaiming, kaiming
from lrc.initialisers.pissa import Pissa, pissa
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (kaiming, gaussian, pissa)

__all__ = [
    "BUILTIN",
    "Gaussian",
    "Initial",
    "Initialise",
    "InitialiserOptions",
    "Kaiming",
    "Pissa",
    "Start",
    "initialiser",
    "subtracted",
]
