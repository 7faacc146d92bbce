"""hydra: a low-rank branch beside the frozen weight, and another one after it.

X  ->  Sum(base: Chain(Sum(I, Scale(s, Chain(D, C))), X*), adapter: Scale(s, Chain(B, A)))

%h = linear(%x, fc.weight, fc.bias)
%y = %h + s * linear(linear(%h, C), D) + s * linear(linear(%x, A), B)

The branch after the weight sees its bias and not the other branch, so W' = W + s (B A + D C W): no term D C B A.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lrc.maps import Chain, Dropout, Identity, LinearMap, Sum
from lrc.run import AdapterOptions, Keep, Place, adapter
from lrc_passes.adapters.parts import biased_base, kaiming_uniform, normal, number, own_biases, times

Start = Literal["kaiming", "xavier", "normal"]


class Hydra(AdapterOptions):
    """A parallel and a sequential low-rank branch; `rank` is that of the parallel one."""

    type: Literal["hydra"] = "hydra"
    sequential: int = Field(default=2, ge=0, description="Rank of the branch after the weight; 0: none.")
    parallel: bool = Field(default=True, description="Whether there is a branch beside the weight, of rank `rank`.")
    branch_bias: bool = Field(default=True, description="Whether every factor has a bias, which starts at zero.")
    sequential_init: Start = Field(
        default="kaiming", description="Where C of the branch after the weight starts: uniform in ±1/sqrt(out_features), by "
        "Xavier's rule, or normal of deviation 0.02."
    )  # fmt: skip
    train_scale: bool = Field(default=False, description="Whether s is trained: one number a site, of both branches.")
    default_rank: ClassVar[int] = 2
    default_alpha: ClassVar[float | None] = None


@adapter(Hydra)
def hydra(place: Place, options: Hydra) -> LinearMap | Keep:
    """X -> (I + s D C) X* + s B A, D and B zero at the start; s = alpha / rank, or 1 where no alpha is given.

    Source: Kim et al. (2023), arXiv:2309.06922. The branch beside the weight starts as the spec's initialiser says, the one
    after it as `sequential_init` does: the authors' three codes have the three. A table has only the branch after it. Dropout
    stands between the factors, as in the authors' code.
    """
    parallel = options.parallel and place.site.kind != "embedding"
    if options.sequential == 0 and not parallel:
        return Keep("no branch: `sequential` is 0, and there is none beside the weight")
    reason = own_biases(place)
    if reason is not None and (options.sequential or options.branch_bias):
        return Keep(reason)
    if parallel:
        base, initial = place.started()
    else:
        base = place.base()
        place.notes += ["a table has the branch after it alone"] if options.parallel else []
    whole = biased_base(place, base)
    scale = number(place, place.scaling) if options.train_scale else None
    if options.sequential:
        whole = Chain(after(place, options, scale), whole, names=("after", "inner"))
    if not parallel:
        return whole
    beside = factors(place, initial.B, place.site.layout.dense(*biased(place, initial.A, options)), options)
    return Sum(whole, scaled(place, beside, scale), names=("base", "adapter"))


def scaled(place: Place, branch: Chain, scale: nn.Parameter | None) -> LinearMap:
    """Return s times a branch, trained or fixed."""
    return place.scaled(branch) if scale is None else times(scale, branch)


def after(place: Place, options: Hydra, scale: nn.Parameter | None) -> LinearMap:
    """Return x -> x + s D (C x)."""
    features, rank, layout = place.site.out_features, options.sequential, place.site.layout
    C = layout.pointwise(*biased(place, started(place, rank, features, options.sequential_init), options))
    branch = factors(place, torch.zeros(features, rank), C, options)
    return Sum(Identity(features, place.site.dtype), scaled(place, branch, scale), names=("identity", "adapter"))


def started(place: Place, rank: int, features: int, start: Start) -> Tensor:
    """Return C, (rank, features), as the word says."""
    if start == "kaiming":
        return kaiming_uniform(place, rank, features)
    if start == "normal":
        return normal(place, rank, features, std=0.02)
    bound = math.sqrt(6 / (rank + features))
    return torch.empty(rank, features).uniform_(-bound, bound, generator=place.generator)


def factors(place: Place, B: Tensor, A: LinearMap, options: Hydra) -> Chain:
    """Return B after A, with the dropout between them."""
    outer = place.site.layout.pointwise(*biased(place, B, options))
    if place.dropout == 0.0:
        return Chain(outer, A)
    return Chain(outer, Dropout(B.shape[1], place.dropout, place.site.dtype), A, names=("B", "dropout", "A"))


def biased(place: Place, matrix: Tensor, options: Hydra) -> tuple[Tensor, Tensor | None]:
    """Return a matrix in the site's dtype, with a bias of zeros where the options ask for one."""
    made = matrix.to(place.site.dtype).contiguous()
    return made, made.new_zeros(made.shape[0]) if options.branch_bias else None
