"""What a site may become: kinds of options, each of which offers some maps in place of a weight.

A way is a function `(target, variant) -> map`, tied to options that say which variants there are for a shape. Whatever a
way makes, its loss is measured by one functional on the difference to the weight, so that all options may be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lrc.maps import LinearMap
from lrc.solvers import Decomposition
from lrc.solvers.base import Norm
from lrc.solvers.feedback import Feedback
from lrc.spec.base import Tagged
from lrc.spec.registry import WAYS, Rule

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Variant:
    """One option of a way. name: what the plan calls it, unlike any other of the pass."""

    name: str


class WayOptions(Tagged):
    """The options of a way."""

    def variants(self, out_features: int, in_features: int) -> Sequence[Variant]:
        """Return what the way offers for a weight of this shape."""
        raise TypeError(f"{type(self).__name__} does not say what it offers")


def way(options: type[WayOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a function `(target, variant) -> LinearMap`, without bias, to its options model. Registers nothing."""
    return WAYS.rule(options)


@dataclass(frozen=True)
class Target:
    """A weight that is to be replaced, and what errors of it cost.

    terms: its decomposition, with all terms, in the norm that losses are multiples of. dtype: of the numbers that a map
    stores unpacked.
    """

    terms: Decomposition
    dtype: torch.dtype

    @property
    def norm(self) -> Norm:
        """What options are fitted and measured in: ||Kᵀ dW L||_F², K Kᵀ = G and L Lᵀ = C, both damped."""
        assert self.terms.norm is not None, "the pass has checked that its solver has a norm"
        return self.terms.norm

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features), float64."""
        return self.norm.target

    @cached_property
    def gram(self) -> Tensor:
        """C of the norm, (in_features, in_features), float64."""
        right = self.norm.right
        if right is None:
            return torch.eye(self.weight.shape[1], dtype=torch.float64)
        return right.matrix @ right.matrix.T

    @cached_property
    def feedback(self) -> Feedback:
        """Rounding for these inputs."""
        return Feedback(self.gram)

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """K and L in float32: a loss needs no more digits, and there are many."""
        left, right = (root.matrix if root else None for root in (self.norm.left, self.norm.right))
        sides = zip((left, right), self.weight.shape, strict=True)
        K, L = ((torch.eye(size) if side is None else side).float() for side, size in sides)
        return K, L

    @cached_property
    def outer(self) -> Tensor:
        """The diagonal of K Kᵀ, what errors of every output cost, (out_features,), float64."""
        left = self.norm.left
        return self.weight.new_ones(self.weight.shape[0]) if left is None else left.matrix.square().sum(1)

    @property
    def entries(self) -> Tensor:
        """What a squared error of every entry costs alone, (out_features, in_features), float64, but for a factor."""
        return self.outer[:, None] * self.gram.diagonal()

    def loss(self, weight: Tensor) -> float:
        """Return 1/2 tr(G dW C dWᵀ) of a weight (out_features, in_features) in place of this one, in nats per token.

        G and C are damped: without that, what is cut off along directions that a few samples did not see would seem to cost
        less than rounding, and does not on other samples (docs/auto.md, measured).
        """
        left, right = self.roots
        error = (weight.double() - self.weight).float()
        return self.terms.scale * float((left.T @ error @ right).double().square().sum())

    def finished(self, made: LinearMap) -> LinearMap:
        """Return a map with the site's bias, which makes up for the mean of what the map drops where inputs are centred."""
        bias = self.terms.bias
        if self.terms.mean is not None:
            bias = self.terms.bias_for(made.exact().weight @ self.terms.mean.double())
        return made if bias is None else made.with_bias(torch.nn.Parameter(bias.to(self.dtype)))


def shares_of(shares: Sequence[float], side: int) -> list[int]:
    """Return the ranks that shares of a side mean, multiples of 8 where there is room for them, each once."""
    found = {max(1, round(share * side)) for share in shares}
    return sorted({max(8, round(rank / 8) * 8) if side >= 64 else rank for rank in found})


def find(options: Sequence[WayOptions], name: str, out_features: int, in_features: int) -> tuple[Rule[Any, Any], Variant]:
    """Return the way and the variant that a name stands for."""
    for of_way in options:
        for variant in of_way.variants(out_features, in_features):
            if variant.name == name:
                return WAYS.for_options(of_way), variant
    raise KeyError(name)
