"""Numerics on tensors alone: how a weight is decomposed into ordered low-rank terms."""

from typing import Any

from lrc.solvers.afm import AfmSolver, LordSolver, afm, lord
from lrc.solvers.base import LOSS_UNIT, Decomposition, Factors, Moments, Need, Solve, SolverOptions, solver
from lrc.solvers.gram import GramSolver, gram
from lrc.solvers.inputs import InputsOptions, propagated_target
from lrc.solvers.kfac import KfacSolver, kfac
from lrc.solvers.ladder import Root, root
from lrc.solvers.pivot import Pivot, Refusal, pivot
from lrc.solvers.svd import SvdSolver, svd
from lrc.solvers.whitened import WhitenedSolver, whitened
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (kfac, whitened, afm, lord, svd, gram)

__all__ = [
    "BUILTIN",
    "LOSS_UNIT",
    "AfmSolver",
    "Decomposition",
    "Factors",
    "GramSolver",
    "InputsOptions",
    "KfacSolver",
    "LordSolver",
    "Moments",
    "Need",
    "Pivot",
    "Refusal",
    "Root",
    "Solve",
    "SolverOptions",
    "SvdSolver",
    "WhitenedSolver",
    "afm",
    "gram",
    "kfac",
    "lord",
    "pivot",
    "propagated_target",
    "root",
    "solver",
    "svd",
    "whitened",
]
