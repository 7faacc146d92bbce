"""Ranks in proportion to what layers contribute: scores in, ranks out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from lrc.errors import UsageError
from lrc.ranks.base import Choice, SiteCurve, rank_policy
from lrc.ranks.budgets import Allocation, BudgetPolicy, Setting
from lrc.spec.base import SpecModel


class Contribution(SpecModel):
    """How a budget is shared by contribution."""

    budget: float = Field(
        ge=0, le=1, strict=False, description="numbers of all products over those of the targets' weights, no unit"
    )
    scores: dict[str, float] = Field(
        description="Contribution of every target, by name, or the JSON file that `lrc.measure.write_scores` has made."
    )
    beside: int = Field(
        default=0,
        ge=0,
        description="Numbers that are trained beside the products (biases, norms), which the budget covers too.",
    )
    beta: float = Field(
        default=0.0, ge=-1, le=1, strict=False, description="Share of its own numbers that a layer without a contribution has."
    )
    least: float = Field(default=0.0, ge=0, le=1, strict=False, description="Smallest share of a layer's own numbers.")
    most: float = Field(default=0.5, gt=0, le=1, strict=False, description="Largest share of a layer's own numbers.")

    @field_validator("scores", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Read scores from a file."""
        if not isinstance(value, str):
            return value
        try:
            return {str(name): float(score) for name, score in json.loads(Path(value).read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{value} is no JSON file of names and scores: {error}") from error

    @field_validator("scores")
    @classmethod
    def _no_negative(cls, value: dict[str, float]) -> dict[str, float]:
        for name, score in value.items():
            if not 0 <= score < float("inf"):
                raise ValueError(f"the score of {name} is {score}; a contribution is not negative and finite")
        return value


class ContributionRank(BudgetPolicy):
    """Share ranks by how much every layer contributes to a task."""

    contribution: Contribution = Field(description="the budget, and the contribution of every layer")
    by_scores: ClassVar[bool] = True


@rank_policy(ContributionRank)
def contribution(curves: Sequence[SiteCurve], options: ContributionRank, setting: Setting) -> Allocation:
    """Return r_i = round(delta_i p_i / c_i), delta_i = clip(alpha s_i + beta, least, most), with the largest alpha that fits.

    p_i: numbers of the weight; c_i: numbers of one rank, out_features + in_features; s_i: the score over the largest one. What
    the bisection on alpha leaves goes to the sites that are next, by score and then in order. The losses are not looked at.
    The rule is ours, after Park et al. (2024), arXiv:2408.01099, whose exact function is not published with code. Raises
    UsageError for a target without a score, and where `least` and `beta` alone are over the budget.
    """
    asked = options.contribution
    for curve in curves:
        if curve.name not in asked.scores:
            raise UsageError(
                "rank.contribution.scores", message=f"no score for {curve.name}",
                hint="Measure it, or name the site under `ignore`",
            )  # fmt: skip
    amount = asked.budget * sum(curve.dense_size for curve in curves) * (1 + 1e-12) - asked.beside
    ranks = shared(curves, [asked.scores[curve.name] for curve in curves], amount, asked, setting.round_to)
    none = Choice(None, "it contributes too little for a rank of 1")
    pairs = zip(curves, ranks, strict=True)
    return Allocation({curve.name: Choice(rank, form="two_factor") if rank else none for curve, rank in pairs})


def shared(
    curves: Sequence[SiteCurve], scores: Sequence[float], amount: float, asked: Contribution, round_to: int = 1
) -> list[int]:
    """Return the ranks, in order."""
    top = max(scores, default=0.0)
    parts = [score / top if top > 0 else 0.0 for score in scores]

    def ranks(alpha: float) -> list[int]:
        return [rank_at(curve, alpha * s + asked.beta, asked, round_to) for curve, s in zip(curves, parts, strict=True)]

    low, high = 0.0, min((asked.most - asked.beta) / min((s for s in parts if s > 0), default=1.0), 1e300)
    if spent(curves, ranks(low)) > amount:
        least = (spent(curves, ranks(low)) + asked.beside) / sum(curve.dense_size for curve in curves)
        raise UsageError(
            "rank.contribution.budget",
            expected=f"at least {least:.4g}, which what is trained beside, `least` and `beta` need",
            got=f"{asked.budget:g}",
        )
    if spent(curves, ranks(high)) <= amount:
        return ranks(high)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if spent(curves, ranks(middle)) <= amount else (low, middle)
    found, upper = ranks(low), ranks(high)
    for i in sorted(range(len(curves)), key=lambda i: (-parts[i], i)):
        more = [*found[:i], upper[i], *found[i + 1 :]]
        found = more if spent(curves, more) <= amount else found
    return found


def rank_at(curve: SiteCurve, share: float, asked: Contribution, round_to: int) -> int:
    """Return the rank whose product has about this share of the weight's numbers."""
    delta = min(max(share, asked.least), asked.most)
    rank = round(delta * curve.dense_size / (curve.out_features + curve.in_features))
    return min(rank - rank % round_to, curve.full_rank)


def spent(curves: Sequence[SiteCurve], ranks: Sequence[int]) -> int:
    """Return the numbers of all products."""
    return sum(rank * (curve.out_features + curve.in_features) for curve, rank in zip(curves, ranks, strict=True))
