"""Numerics on tensors alone: how a weight is decomposed into ordered low-rank terms."""

from typing import Any

from lrc.solvers.afm import AfmSolver, LordSolver, afm, lord
from lrc.solvers.altmin import AltminSolver, altmin
from lrc.solvers.auto import AutoSolver, auto
from lrc.solvers.base import LOSS_UNIT, Decomposition, Factors, Moments, Need, Solve, SolverOptions, solver
from lrc.solvers.gram import GramSolver, gram
from lrc.solvers.inputs import InputsOptions, propagated_target
from lrc.solvers.kfac import KfacSolver, kfac
from lrc.solvers.ladder import Root, root
from lrc.solvers.pivot import Pivot, Refusal, pivot
from lrc.solvers.randomized import RandomizedSolver, randomized
from lrc.solvers.svd import SvdSolver, svd
from lrc.solvers.whitened import WhitenedSolver, whitened
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (kfac, whitened, afm, lord, svd, gram, randomized, auto, altmin)

__all__ = [
    "BUILTIN",
    "LOSS_UNIT",
    "AfmSolver",
    "AltminSolver",
    "AutoSolver",
    "Decomposition",
    "Factors",
    "GramSolver",
    "InputsOptions",
    "KfacSolver",
    "LordSolver",
    "Moments",
    "Need",
    "Pivot",
    "RandomizedSolver",
    "Refusal",
    "Root",
    "Solve",
    "SolverOptions",
    "SvdSolver",
    "WhitenedSolver",
    "afm",
    "altmin",
    "auto",
    "gram",
    "kfac",
    "lord",
    "pivot",
    "propagated_target",
    "randomized",
    "root",
    "solver",
    "svd",
    "whitened",
]
