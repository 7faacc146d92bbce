"""Adam with decoupled weight decay, in the form that the low-rank optimisers of this package share."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrc.train.optim.quantized import Codes, read_moment, write_moment

HALF = (torch.bfloat16, torch.float16)
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Adam(Optimizer):
    """w <- w - lr sqrt(1 - beta2^t) / (1 - beta1^t) M / (sqrt(V) + eps); then w <- w - lr weight_decay w.

    M and V are running means of the gradient and of its square. Weights decay after the step, and eps is added to the
    uncorrected root, as in the optimisers of GaLore, Fira and SoRA (`torch.optim.AdamW` does either the other way). A
    parameter of 16 bits is updated in float32 and rounded once. state_bits: 8 stores M and V as block-wise codes.
    Raises ValueError for options out of range, RuntimeError for sparse gradients.
    Source: Loshchilov & Hutter (2019), arXiv:1711.05101; 8 bits: Dettmers et al. (2022), arXiv:2110.02861.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        **defaults: Any,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr, eps and weight_decay are not negative, got {lr}, {eps} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are in [0, 1), got {betas}")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is 8 or 32, got {state_bits}")
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_bits": state_bits}
        super().__init__(params, given | defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        """Update every parameter that has a gradient. closure: reevaluates the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
                state = self.state[p]
                state.setdefault("step", 0)
                self.move(p, self.update(self.gradient(p), group, state), group, state)
        return loss

    def gradient(self, p: Tensor) -> Tensor:
        """Return the gradient in the precision that the update is computed in."""
        assert p.grad is not None, "only parameters with a gradient are updated"
        return p.grad.float() if p.grad.dtype in HALF else p.grad

    def update(self, grad: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Return the direction of the step, in the shape of the parameter; the step counter moves on."""
        return self.normalized(grad, group, state)

    def normalized(self, grad: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Take `grad` into the moments and return M / (sqrt(V) + eps), in the shape of `grad`."""
        beta1, beta2 = group["betas"]
        mean = read_moment(state, "exp_avg", grad)
        square = read_moment(state, "exp_avg_sq", grad)
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        found = mean / square.sqrt().add_(group["eps"])
        if group["state_bits"] == 8:
            write_moment(state, "exp_avg", mean, Codes.SIGNED)
            write_moment(state, "exp_avg_sq", square, Codes.UNSIGNED)
        else:
            state["exp_avg"], state["exp_avg_sq"] = mean, square
        state["step"] += 1
        return found

    def move(self, p: Tensor, direction: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Take the step, then let the weights decay."""
        beta1, beta2 = group["betas"]
        t = state["step"]
        size = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        target = p.float() if p.dtype in HALF else p
        target.add_(direction, alpha=-size)
        if group["weight_decay"] > 0:
            target.add_(target, alpha=-group["lr"] * group["weight_decay"])
        if target is not p:
            p.copy_(target)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's own, every tensor keeps the dtype that it was saved in (codes, float32 moments)."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value
