"""Several changes of one weight made one: linear, TIES, DARE."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Method = Literal["linear", "ties", "dare", "dare_ties"]


def combine(
    changes: Sequence[Tensor], weights: Sequence[float], method: Method, density: float, generator: torch.Generator
) -> Tensor:
    """Return one change of a weight made of several, all of one shape. weights: one factor each; density: the kept share."""
    if method == "linear":
        return linear(changes, weights)
    if method in ("dare", "dare_ties"):
        changes = [dropped(change, density, generator) for change in changes]
    else:
        changes = [trimmed(change, density) for change in changes]
    return linear(changes, weights) if method == "dare" else agreed(changes, weights)


def linear(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum."""
    return torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)]).sum(0)


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return the change with all but its share `density` of largest entries set to zero; at least one entry stays.

    Source: Yadav et al. (2023), arXiv:2306.01708, section 3.2, step 1.
    """
    kept = max(1, round(density * change.numel()))
    places = change.abs().flatten().topk(kept).indices
    made = torch.zeros_like(change).flatten()
    made[places] = change.flatten()[places]
    return made.reshape(change.shape)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the change with entries left out at random, and those that stay, a share of `density`, divided by it.

    Source: Yu et al. (2024), arXiv:2311.03099, equations 2 and 3.
    """
    stays = torch.rand(change.shape, generator=generator) < density
    return change * stays / density


def agreed(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return, entry by entry, the mean of the weighted changes whose sign is that of all changes' sum; zeros take no part.

    Source: Yadav et al. (2023), arXiv:2306.01708, section 3.2, steps 2 and 3; the sign is elected without the weights, which
    then stand in front of the changes, as in PEFT.
    """
    stacked = torch.stack(list(changes))
    agreeing = stacked.sign().eq(stacked.sum(0).sign()) & stacked.ne(0)
    return linear([change * chosen for change, chosen in zip(changes, agreeing, strict=True)], weights) / agreeing.sum(0).clamp(
        min=1
    )
