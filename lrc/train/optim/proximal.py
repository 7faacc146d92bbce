"""Proximal gradient steps for gates: after every update their magnitudes shrink by a threshold, and small ones become 0."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.train.optim.adam import Adam, Params
from lrc.train.optim.base import OptimizerOptions, Trained, optimizer

Prox = Literal["soft", "reference"]


def soft_threshold(v: Tensor, xi: float) -> Tensor:
    """Return sign(v) max(|v| - xi, 0): argmin over u of (u - v)^2 / 2 + xi |u|, exactly 0 where |v| <= xi.

    Source: Ding et al. (2023), arXiv:2311.11696, equation 7.
    """
    return torch.sign(v) * (v.abs() - xi).clamp_(min=0)


def reference_threshold(v: Tensor, xi: float) -> Tensor:
    """Return what the code of SoRA computes: 0 where |v| < 2 xi but for |v| = xi, which stays; else |v| falls by xi.

    Its three assignments run one after the other on values that the ones before have moved. For comparisons only.
    """
    size = v.abs()
    shrunk = torch.where(size >= 2 * xi, torch.sign(v) * (size - xi), torch.zeros_like(v))
    return torch.where(size == xi, v, shrunk)


THRESHOLDS: Mapping[str, Callable[[Tensor, float], Tensor]] = {"soft": soft_threshold, "reference": reference_threshold}


@torch.no_grad()
def threshold_(p: Tensor, group: Mapping[str, Any]) -> None:
    """Apply the operator of a group to a parameter, in place."""
    xi = group["threshold"] * (group["lr"] if group["scale_by_lr"] else 1)
    if xi > 0:
        p.copy_(THRESHOLDS[group["prox"]](p, xi))


def checked(threshold: float, prox: str) -> None:
    """Raise ValueError for options out of range."""
    if threshold < 0:
        raise ValueError(f"threshold is not negative, got {threshold}")
    if prox not in THRESHOLDS:
        raise ValueError(f"prox is one of {', '.join(THRESHOLDS)}, got {prox!r}")


class ProximalSGD(torch.optim.SGD):
    """SGD, then the threshold operator on every parameter of a group whose `threshold` xi is positive.

    scale_by_lr: xi is `threshold` times the current learning rate, the textbook form of the proximal gradient method.
    Gates want a group of their own: `[{"params": factors}, {"params": gates, "threshold": 3e-4}]`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        threshold: float = 0.0,
        scale_by_lr: bool = False,
        prox: Prox = "soft",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, **options)
        for name, value in (("threshold", threshold), ("scale_by_lr", scale_by_lr), ("prox", prox)):
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)
        for group in self.param_groups:
            checked(group["threshold"], group["prox"])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        """Take the step, then apply the operator."""
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    threshold_(p, group)
        return loss


class ProximalAdamW(Adam):
    """AdamW (see `Adam`), then the threshold operator on every parameter of a group whose `threshold` xi is positive.

    Adam moves a parameter by about lr a step, so a gate survives where its normalised gradient stays above xi / lr.
    Source: Ding et al. (2023), arXiv:2311.11696, section 3.2 (there xi = eta lambda).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        threshold: float = 0.0,
        scale_by_lr: bool = False,
        prox: Prox = "soft",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, threshold=threshold, scale_by_lr=scale_by_lr, prox=prox, **options)
        for group in self.param_groups:
            checked(group["threshold"], group["prox"])

    def move(self, p: Tensor, direction: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Take the step, then apply the operator."""
        super().move(p, direction, group, state)
        threshold_(p, group)


class ProximalOptions(OptimizerOptions):
    """What both proximal optimisers have."""

    threshold: float = Field(default=1e-3, ge=0, description="By how much the magnitude of a gate falls after every step.")
    scale_by_lr: bool = Field(default=False, description="Multiply the threshold by the learning rate of the step.")
    prox: Prox = Field(default="soft", description="soft: the paper's operator; reference: that of SoRA's code.")

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of all parameters, and those of gates."""
        given = self.arguments()
        return given, {name: given.pop(name) for name in ("threshold", "scale_by_lr", "prox")}


class ProximalAdamWOptions(ProximalOptions):
    """AdamW, and after every step a soft threshold on the gates."""

    type: Literal["proximal_adamw"] = "proximal_adamw"
    eps: float = Field(default=1e-6, ge=0, description="Added to the root of the mean square.")


class ProximalSGDOptions(ProximalOptions):
    """SGD, and after every step a soft threshold on the gates."""

    type: Literal["proximal_sgd"] = "proximal_sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Of the running mean of the gradients.")

    def arguments(self) -> dict[str, Any]:
        """Return the options without those of Adam."""
        return self.model_dump(exclude={"type", "betas", "eps"})

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of the momentum, if there is one."""
        return shape.numel() * itemsize if self.momentum else 0


@optimizer(ProximalAdamWOptions)
def proximal_adamw(trained: Trained, options: ProximalAdamWOptions) -> ProximalAdamW:
    """Return ProximalAdamW: the threshold acts on gates alone."""
    given, gates = options.split()
    return ProximalAdamW(trained.groups(gates=gates), **given)


@optimizer(ProximalSGDOptions)
def proximal_sgd(trained: Trained, options: ProximalSGDOptions) -> ProximalSGD:
    """Return ProximalSGD: the threshold acts on gates alone."""
    given, gates = options.split()
    return ProximalSGD(trained.groups(gates=gates), **given)
