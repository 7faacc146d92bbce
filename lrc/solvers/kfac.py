"""Our default: the weight whitened on both sides, by its inputs and by the loss's gradient at its outputs."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import LOSS_UNIT, Decomposition, Moments, Need, solver
from lrc.solvers.checks import check
from lrc.solvers.fisher import FocusOptions, focused
from lrc.solvers.inputs import InputsOptions, centers, input_moment, propagated_target
from lrc.solvers.ladder import root
from lrc.solvers.modular import ModularSolver
from lrc.solvers.terms import ordered_terms, storage_dtype
from lrc.solvers.whitened import with_bias

DAMPING_OUT = {"conv": 0.1}  # of ResNet-20 on training images that were held out of the calibration: docs/measured.md
GROWTH = 10.0  # a truncated weight this much larger than W has lost its digits in directions that the loss does not see
STEP = 10.0
ATTEMPTS = 8


class KfacSolver(InputsOptions, FocusOptions):
    """The least loss in second order: inputs and output gradients weigh the error (Kronecker-factored Fisher)."""

    type: Literal["kfac"] = "kfac"
    damping_in: float = Field(
        default=1e-2, ge=0, description="Added to the diagonal of the inputs' second moment, of its mean."
    )
    damping_out: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Added to the diagonal of the gradients' second moment, of its mean; auto: 0.1 for a convolution, whose "
        "gradients are those of many positions, else 1.",
    )
    modules: bool = Field(
        default=True,
        description="Under a budget of size or FLOPs, with `form: auto`, let MLPs and attentions become narrower, as "
        "`modular` does, where that is predicted to lose less.",
    )
    modules_factor: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="How many times the predicted loss of a narrower module counts beside that of its matrices: the second "
        "order sees less of what is lost at once; auto: 1 for `fisher: outputs`, whose loss is quadratic, else 1.5.",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS, Need.GRADIENTS})

    def modules_solver(self) -> ModularSolver | None:
        """Return the solver of whole modules that is offered beside this one: statistics and unit of loss are the same."""
        if not self.modules:
            return None
        damping = 1.0 if self.damping_out == "auto" else self.damping_out
        return ModularSolver(fisher=self.fisher, focus=self.focus, damping_in=self.damping_in, damping_out=damping)

    def settled(self, *, logits: bool) -> Self:
        """Return the options with what depends on whose gradients are taken settled."""
        made = super().settled(logits=logits)
        factor = (1.0 if made.fisher == "outputs" else 1.5) if made.modules_factor == "auto" else made.modules_factor
        return made.model_copy(update={"modules_factor": factor})

    def at(self, kind: str) -> Self:
        """Return the options with the damping of G settled for a kind of site."""
        damping = DAMPING_OUT.get(kind, 1.0) if self.damping_out == "auto" else self.damping_out
        return self.model_copy(update={"damping_out": damping})


@solver(KfacSolver)
def kfac(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: KfacSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms that minimise 1/2 tr(G dW C dWᵀ), the loss's increase in second order, for every rank.

    weight: (out_features, in_features). C = E[x xᵀ] (or the covariance, with the mean kept by the bias), G = E[g gᵀ], both
    damped; U S Vᵀ = svd(Kᵀ W L), L Lᵀ = C, K Kᵀ = G. The loss at rank r, 1/2 sum of S[r:]², is in nats per token and adds
    up over layers. Computed in float64. Raises SolverError on statistics that are missing, misshapen or not finite.
    Source: Martens & Grosse (2015), arXiv:1503.05671, for the Kronecker factors. Departure: the damping of G is raised where
    the truncated weight outgrows W, and a note says so.
    """
    check(weight, bias, moments, max_rank, options.needs)
    if moments.fisher is None:
        raise SolverError("moments.fisher", expected="the second moment of the output gradients", got="none")
    options = options.settled(logits=True).at("linear")
    fisher, center = moments.fisher, centers(options, bias)
    moments = focused(moments, float(options.focus))
    L = root(input_moment(moments, center), "gram", options.damping_in)
    target = propagated_target(weight, moments, options.blend, center=center)
    asked = damping = float(options.damping_out)
    notes = L.notes
    for _ in range(ATTEMPTS):
        K = root(fisher, "fisher", damping)
        terms = ordered_terms(target, K, L, max_rank, storage_dtype(weight))
        if growth(terms, target) <= GROWTH:
            break
        damping = max(damping, 1e-6) * STEP
    if damping != asked:
        notes += (f"damping_out raised from {asked:g} to {damping:g}: the truncated weight outgrew the weight",)
    scale = 0.5 * L.weight * K.weight
    terms = replace(terms, scale=scale, unit=LOSS_UNIT, notes=notes + K.notes)
    return with_bias(terms, weight, bias, moments, center)


def growth(terms: Decomposition, weight: Tensor) -> float:
    """Return ||B A||_F / ||W||_F at half of the stored rank, where rounding in unseen directions would show."""
    rank = (len(terms.S) + 1) // 2
    B, A = terms.B[:, :rank].double(), terms.A[:rank].double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    norm = float(weight.double().norm())
    return squared**0.5 / norm if norm > 0 and squared > 0 else 0.0
