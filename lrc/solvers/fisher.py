"""What the solvers that weigh by gradients share: whose gradients they are."""

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field

from lrc.solvers.base import Moments, SolverOptions


class FisherOptions(SolverOptions):
    """Options of a solver that asks for gradients."""

    fisher: Literal["auto", "sampled", "labels", "outputs"] = Field(
        default="auto",
        description="Gradients of: labels drawn from the model's own prediction, the data's labels, or a squared error of "
        "the outputs; auto: sampled for a model with logits, outputs for all others.",
    )

    def settled(self, *, logits: bool) -> Self:
        """Return the options with `auto` settled: labels are drawn where there are logits to draw them from."""
        fisher = ("sampled" if logits else "outputs") if self.fisher == "auto" else self.fisher
        return self.model_copy(update={"fisher": fisher})


class FocusOptions(FisherOptions):
    """Options of a solver that weighs inputs by the gradients of their tokens."""

    focus: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        description="Share of the inputs' second moment in which a token counts by the squared norm of its gradient, in the "
        "rest all count the same; auto: 1 for `fisher: outputs`, else 0.5.",
    )

    def settled(self, *, logits: bool) -> Self:
        """Return the options with both kinds of `auto` settled."""
        made = super().settled(logits=logits)
        focus = (1.0 if made.fisher == "outputs" else 0.5) if made.focus == "auto" else made.focus
        return made.model_copy(update={"focus": focus})


def focused(moments: Moments, focus: float) -> Moments:
    """Return the moments with a share `focus` of the inputs weighed by the gradient of their token, where that was measured.

    The Fisher of a layer is E[g gᵀ ⊗ x xᵀ]. With G = E[g gᵀ], the C that makes G ⊗ C closest to it along the trace of its left
    side is E[|g|² x xᵀ] / E[|g|²]: tokens that the loss does not look at do not count. That C rests on few tokens where
    gradients have heavy tails, as those of language models do, hence the other share.
    Source: one step of the power iteration for the nearest Kronecker product, Van Loan & Pitsianis (1993),
    doi:10.1007/978-94-015-8196-7_17.
    """
    gram, mean = moments.weighted_gram, moments.weighted_mean
    if gram is None or mean is None or moments.gram is None or moments.mean is None or moments.cross is not None:
        return moments
    return replace(moments, gram=torch.lerp(moments.gram, gram, focus), mean=torch.lerp(moments.mean, mean, focus))
