"""Objectives: what training makes smaller; one function each, found through the registry."""

from typing import Any

from lrc.spec.registry import Rule
from lrc.train.objectives.base import ObjectiveOptions, Step, objective
from lrc.train.objectives.distillation import distillation, reconstruction
from lrc.train.objectives.language import causal_lm, masked_lm
from lrc.train.objectives.python import python
from lrc.train.objectives.supervised import classification, cosine, regression

BUILTIN: tuple[Rule[Any, Any], ...] = (
    causal_lm, masked_lm, classification, regression, cosine, distillation, reconstruction, python,
)  # fmt: skip

__all__ = ["BUILTIN", "ObjectiveOptions", "Step", "objective"]
