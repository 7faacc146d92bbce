"""LoRAPrune's numbers: an importance from the factors of an adapter and their gradients alone, and how pruning goes on.

Source: Zhang et al. (2024), arXiv:2305.18403, equations 6 to 9, and the authors' code.
"""

import torch
from torch import Tensor


def guided_gradient(A: Tensor, B: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """Return gB A + B gA - gB gA, (out_features, in_features): how B A changes by a step of gradient descent of rate 1.

    A: (rank, in_features), B: (out_features, rank), and their gradients. Equal to B A - (B - gB)(A - gA).
    """
    return grad_b @ A + (B - grad_b) @ grad_a


def guided_entries(weight: Tensor, gradient: Tensor, power: int = 1) -> Tensor:
    """Return |gradient * weight| ** power, entry by entry. weight: the frozen one with the adapter's product."""
    return (gradient * weight).abs() ** power


def normalised(sums: Tensor) -> Tensor:
    """Return the scores of a module's units over their length, so that all modules of a group count alike."""
    length: Tensor = sums.norm()
    return sums / (length + 1e-8)


def pruned_share(step: int, steps: int, *, initial: float, final: float, warmup: float, cooldown: float) -> float:
    """Return the share of units that are gone at a step: cubic between a warmup and a cooldown, both shares of all steps."""
    start, end = warmup * steps, (1 - cooldown) * steps
    if step <= start:
        return initial
    if step >= end:
        return final
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3


def kept_units(importance: Tensor, mask: Tensor, gone: int) -> Tensor:
    """Return the new mask (units,) bool: the `gone` least important units are out, and what was out stays out."""
    order = torch.where(mask, importance, torch.full_like(importance, -torch.inf)).argsort(stable=True)
    new = mask.clone()
    new[order[:gone]] = False
    return new
