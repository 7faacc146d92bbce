"""Updates inside the backward pass: every parameter is stepped as soon as its gradient is known, and the gradient freed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrc.train.optim.base import Trained


class PerLayer(Optimizer):
    """One optimiser for every parameter, run by a hook after its gradient is accumulated.

    At most one layer's gradient lives at a time. `step` does nothing, since `backward` has taken the step; gradients of
    several backward passes cannot be accumulated, nor clipped by their common norm. `param_groups` are those of the inner
    optimisers, so a schedule that sets their `lr` works. `remove` takes the hooks away.
    groups: as for `torch.optim`; make: from one group of one parameter to its optimiser. `backward` raises FloatingPointError
    at a gradient that is not finite; what comes before it in the pass has been updated by then.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        alone = [{**group, "params": [p]} for group in groups for p in group["params"]]
        super().__init__([dict(group) for group in alone], {})
        self.optimizers = [make([group]) for group in alone]
        self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]
        self._hooks = [self._watch(inner) for inner in self.optimizers]

    @classmethod
    def of(cls, trained: Trained, make: Callable[[Trained], Optimizer]) -> "PerLayer":
        """Return the same for an optimizer of the spec: every parameter alone is what `make` is given."""
        named = {id(p): name for name, p in trained.parameters.items()}

        def alone(groups: list[dict[str, Any]]) -> Optimizer:
            name = named[id(groups[0]["params"][0])]
            return make(Trained({name: trained.parameters[name]}, trained.gates, factors=trained.factors))

        return cls([{"params": list(trained.parameters.values())}], alone)

    def _watch(self, inner: Optimizer) -> Any:
        (p,) = inner.param_groups[0]["params"]

        def hook(_: Tensor) -> None:
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                raise FloatingPointError(f"the gradient of a parameter of shape {tuple(p.shape)} is not finite")
            inner.step()
            p.grad = None

        return p.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        """Return the loss of the closure; parameters moved while it ran backward."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the inner optimisers, in order."""
        return {"optimizers": [inner.state_dict() for inner in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for inner, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            inner.load_state_dict(state)
        self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]

    def remove(self) -> None:
        """Take the hooks away; gradients then accumulate as usual."""
        for hook in self._hooks:
            hook.remove()
