"""What the solvers that weigh by gradients share: whose gradients they are."""

from typing import Literal, Self

from pydantic import Field

from lrc.solvers.base import SolverOptions


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
