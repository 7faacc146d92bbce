"""What every stored tensor contributes to a task: gradients along the way from one network to another."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrc.errors import UsageError
from lrc.program import Program

T = TypeVar("T")
Call = Callable[..., object]
Loss = Callable[[Call, T], Tensor]


def path_contributions(
    baseline: nn.Module, tuned: nn.Module, sample: T, loss: Loss[T], *, steps: int = 100, offset: float = 0.0
) -> dict[str, Tensor]:
    """Return (theta_b - theta_t) * mean_k dL/dtheta at theta_t + a_k (theta_b - theta_t), a_k = (k + offset) / steps, signed.

    baseline, tuned: two networks of one architecture, in eval mode; loss(call, sample): a scalar, the summed squared error
    in the source, where `call` is the network. The signed sum over all entries tends to loss(baseline) - loss(tuned). offset:
    0 as in the source; 0.5 takes the middle of every step. By name, in the tensors' shapes.
    Source: FAIG: Xie et al. (2021), Finding Discriminative Filters for Specific Degradations, equations 3 to 6.
    Raises UsageError for networks whose parameters differ in name or shape.
    """
    start, end = dict(baseline.named_parameters()), dict(tuned.named_parameters())
    if {name: p.shape for name, p in start.items()} != {name: p.shape for name, p in end.items()}:
        odd = sorted(set(start) ^ set(end)) or [name for name in start if start[name].shape != end[name].shape]
        raise UsageError("contributions", message=f"two networks of different architectures: {', '.join(odd[:3])}")
    moved = {name: (start[name] - end[name]).detach() for name in end}
    total = {name: torch.zeros_like(p) for name, p in moved.items()}
    for k in range(steps):
        share = (k + offset) / steps
        here = {name: (p.detach() + share * moved[name]).requires_grad_() for name, p in end.items()}

        def call(*args: object, weights: Mapping[str, Tensor] = here, **kwargs: object) -> object:
            return functional_call(tuned, dict(weights), args, kwargs)  # type: ignore[arg-type]  # any inputs

        gradients = torch.autograd.grad(loss(call, sample), list(here.values()), allow_unused=True)
        for name, gradient in zip(here, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return {name: moved[name] * total[name] / steps for name in total}


def contributions(
    baseline: nn.Module, tuned: nn.Module, samples: Iterable[T], loss: Loss[T], *, steps: int = 100
) -> dict[str, float]:
    """Return the mean absolute contribution of the entries of every parameter, averaged over samples.

    The absolute value is taken after the mean over the path, entry by entry; a mean over entries, not a sum, so that layers of
    different size compare. Source: as `path_contributions`; the mean a layer: CoLoRA (2024), arXiv:2408.01099, section 3.2.
    """
    means = [
        {name: float(value.abs().mean()) for name, value in path_contributions(baseline, tuned, one, loss, steps=steps).items()}
        for one in samples
    ]
    return {name: sum(mean[name] for mean in means) / len(means) for name in (means[0] if means else ())}


def site_scores(program: Program, found: Mapping[str, float]) -> dict[str, float]:
    """Return the contributions of the sites' weights, by site."""
    return {fqn: found[site.weight_name] for fqn, site in program.sites.items() if site.weight_name in found}


def write_scores(path: str | Path, scores: Mapping[str, float]) -> None:
    """Write scores as the JSON file that `rank: {contribution: {scores: …}}` reads."""
    Path(path).write_text(json.dumps(dict(scores), indent=1, sort_keys=True) + "\n", encoding="utf-8")
