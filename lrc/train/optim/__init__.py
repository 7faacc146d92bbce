"""Optimisers as `torch.optim` classes, usable alone: `from lrc.train.optim import Fira`."""

from typing import Any

from lrc.spec.registry import Rule
from lrc.train.optim.adam import Adam
from lrc.train.optim.adamw import adamw, adamw8bit, sgd
from lrc.train.optim.base import OptimizerOptions, Trained, optimizer
from lrc.train.optim.fira import Fira, fira
from lrc.train.optim.galore import GaLore, galore
from lrc.train.optim.per_layer import PerLayer
from lrc.train.optim.proximal import (
    ProximalAdamW,
    ProximalSGD,
    proximal_adamw,
    proximal_sgd,
    reference_threshold,
    soft_threshold,
)
from lrc.train.optim.riemannian import RiemannianAdamW, riemannian_adamw

BUILTIN: tuple[Rule[Any, Any], ...] = (adamw, adamw8bit, sgd, galore, fira, proximal_adamw, proximal_sgd, riemannian_adamw)

__all__ = [
    "BUILTIN",
    "Adam",
    "Fira",
    "GaLore",
    "OptimizerOptions",
    "PerLayer",
    "ProximalAdamW",
    "ProximalSGD",
    "RiemannianAdamW",
    "Trained",
    "optimizer",
    "reference_threshold",
    "soft_threshold",
]
