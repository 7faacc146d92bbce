"""What methods build their branches of."""

import math

import torch
from torch import Tensor, nn

from lrc.maps import Chain, Dropout, LinearMap, Scalar
from lrc.run import Place


def branch(place: Place, *parts: Tensor | LinearMap, names: tuple[str, ...] = ("B", "A")) -> LinearMap:
    """Return the product of the parts, the last one applied first, with the dropout in front of it; indices are not dropped."""
    if place.dropout == 0.0 or place.site.kind == "embedding":
        return Chain(*parts, names=names)
    left_out = Dropout(place.site.in_features, place.dropout, place.site.dtype)
    return Chain(*parts, left_out, names=(*names, "dropout"))


def number(place: Place, value: float) -> nn.Parameter:
    """Return a constant that is trained, (1,), in the dtype of the site."""
    return nn.Parameter(torch.full((1,), value, dtype=place.site.dtype))


def times(scalar: nn.Parameter, made: Chain) -> Chain:
    """Return a trained constant in front of a product."""
    return Chain(Scalar(scalar, made.out_features, spatial=made.spatial), *made.slots, names=("scale", *made.names))


def constant(values: Tensor) -> nn.Parameter:
    """Return numbers that are stored and not trained."""
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)


def kaiming_uniform(place: Place, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) uniform in ±1/sqrt(columns), as LoRA's A starts."""
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=place.generator)


def normal(place: Place, *size: int, std: float = 1.0) -> Tensor:
    """Return normal numbers of standard deviation `std`, float32."""
    return torch.empty(*size).normal_(0.0, std, generator=place.generator)


def own_biases(place: Place) -> str | None:
    """Return why a bias cannot stand inside the map of a site: its uses add different ones."""
    if len({use.bias for use in place.site.uses}) < 2:
        return None
    return "the weight is used with several biases, and the branch after it would see only one of them"


def biased_base(place: Place, base: LinearMap) -> LinearMap:
    """Return the frozen base with the site's bias, for a branch that sees both."""
    base.set_bias(place.bias)
    return base
