"""hydra: a low-rank branch beside the frozen weight, and another one after it.

X  ->  Sum(base: Chain(Sum(I, Scale(s, Chain(D, C))), X*), adapter: Scale(s, Chain(B, A)))

%h = linear(%x, fc.weight, fc.bias)
%y = %h + s * linear(linear(%h, C), D) + s * linear(linear(%x, A), B)

The branch after the weight sees its bias and not the other branch, so W' = W + s (B A + D C W): no term D C B A.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.maps import Chain, Dropout, Identity, LinearMap, Sum
from lrc.run import AdapterOptions, Keep, Place, adapter
from lrc_passes.adapters.parts import biased_base, kaiming_uniform, own_biases


class Hydra(AdapterOptions):
    """A parallel and a sequential low-rank branch; `rank` is that of the parallel one."""

    type: Literal["hydra"] = "hydra"
    sequential: int = Field(default=2, ge=0, description="Rank of the branch after the weight; 0: none.")
    parallel: bool = Field(default=True, description="Whether there is a branch beside the weight, of rank `rank`.")
    branch_bias: bool = Field(default=True, description="Whether every factor has a bias, which starts at zero.")
    default_rank: ClassVar[int] = 2
    default_alpha: ClassVar[float | None] = None


@adapter(Hydra)
def hydra(place: Place, options: Hydra) -> LinearMap | Keep:
    """X -> (I + s D C) X* + s B A, D and B zero at the start; s = alpha / rank, or 1 where no alpha is given.

    Source: Kim et al. (2023), arXiv:2309.06922. The branch beside the weight starts as the spec's initialiser says, the one
    after it as LoRA does. A table has only the branch after it. Dropout stands between the factors, as in the authors' code.
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
    if options.sequential:
        whole = Chain(after(place, options), whole, names=("after", "inner"))
    if not parallel:
        return whole
    beside = factors(place, initial.B, place.site.layout.dense(*biased(place, initial.A, options)), options)
    return Sum(whole, place.scaled(beside), names=("base", "adapter"))


def after(place: Place, options: Hydra) -> LinearMap:
    """Return x -> x + s D (C x)."""
    features, rank, layout = place.site.out_features, options.sequential, place.site.layout
    C = layout.pointwise(*biased(place, kaiming_uniform(place, rank, features), options))
    branch = factors(place, torch.zeros(features, rank), C, options)
    return Sum(Identity(features, place.site.dtype), place.scaled(branch), names=("identity", "adapter"))


def factors(place: Place, B: Tensor, A: LinearMap, options: Hydra) -> LinearMap:
    """Return B after A, with the dropout between them."""
    outer = place.site.layout.pointwise(*biased(place, B, options))
    if place.dropout == 0.0:
        return Chain(outer, A)
    return Chain(outer, Dropout(B.shape[1], place.dropout, place.site.dtype), A, names=("B", "dropout", "A"))


def biased(place: Place, matrix: Tensor, options: Hydra) -> tuple[Tensor, Tensor | None]:
    """Return a matrix in the site's dtype, with a bias of zeros where the options ask for one."""
    made = matrix.to(place.site.dtype).contiguous()
    return made, made.new_zeros(made.shape[0]) if options.branch_bias else None
