"""Numerics on tensors alone: how a weight is decomposed into ordered low-rank terms."""

from typing import Any

from lrc.solvers.afm import AfmSolver, LordSolver, afm, lord
from lrc.solvers.altmin import AltminSolver, altmin
from lrc.solvers.auto import AutoSolver, auto
from lrc.solvers.base import LOSS_UNIT, Decomposition, Factors, Moments, Need, Norm, Solve, SolverOptions, solver
from lrc.solvers.basis_sharing import BasisSharingSolver, basis_sharing
from lrc.solvers.blocks import solve_blocks
from lrc.solvers.coded import Coded, CodedOptions, SolveCoded, coded_solver
from lrc.solvers.dobi import DobiSolver, dobi
from lrc.solvers.fisher import FisherOptions
from lrc.solvers.gram import GramSolver, gram
from lrc.solvers.groups import Grouping, GroupOptions, GroupTerms, Member, Part, Places, SolveGroup, WeightGroup
from lrc.solvers.inputs import InputsOptions, propagated_target
from lrc.solvers.kfac import KfacSolver, kfac
from lrc.solvers.ladder import Root, root
from lrc.solvers.lr2vq import Lr2vqSolver, lr2vq
from lrc.solvers.modular import ModularSolver, modular
from lrc.solvers.nmf import NmfSolver, SnmfSolver, nmf, snmf
from lrc.solvers.pivot import Pivot, Refusal, pivot
from lrc.solvers.random_init import RandomSolver, random_init
from lrc.solvers.randomized import RandomizedSolver, randomized
from lrc.solvers.scaled import AsvdSolver, FwsvdSolver, asvd, fwsvd
from lrc.solvers.svd import SvdSolver, svd
from lrc.solvers.whitened import WhitenedSolver, whitened
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (
    kfac, whitened, afm, lord, dobi, asvd, fwsvd, svd, gram, randomized, auto, altmin, snmf, nmf, random_init,
    basis_sharing, modular, lr2vq,
)  # fmt: skip

__all__ = [
    "BUILTIN",
    "LOSS_UNIT",
    "AfmSolver",
    "AltminSolver",
    "AsvdSolver",
    "AutoSolver",
    "BasisSharingSolver",
    "Coded",
    "CodedOptions",
    "Decomposition",
    "DobiSolver",
    "Factors",
    "FisherOptions",
    "FwsvdSolver",
    "GramSolver",
    "GroupOptions",
    "GroupTerms",
    "Grouping",
    "InputsOptions",
    "KfacSolver",
    "LordSolver",
    "Lr2vqSolver",
    "Member",
    "ModularSolver",
    "Moments",
    "Need",
    "NmfSolver",
    "Norm",
    "Part",
    "Pivot",
    "Places",
    "RandomSolver",
    "RandomizedSolver",
    "Refusal",
    "Root",
    "SnmfSolver",
    "Solve",
    "SolveCoded",
    "SolveGroup",
    "SolverOptions",
    "SvdSolver",
    "WeightGroup",
    "WhitenedSolver",
    "afm",
    "altmin",
    "asvd",
    "auto",
    "basis_sharing",
    "coded_solver",
    "dobi",
    "fwsvd",
    "gram",
    "kfac",
    "lord",
    "lr2vq",
    "modular",
    "nmf",
    "pivot",
    "propagated_target",
    "random_init",
    "randomized",
    "root",
    "snmf",
    "solve_blocks",
    "solver",
    "svd",
    "whitened",
]
