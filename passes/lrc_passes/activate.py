"""activate: an activation between the two factors of a product, as click-through models that are trained on have it.

Chain(B, A) + b  ->  Chain(B, Activation, A + B⁺ b) + (b - B B⁺ b)

The bias is divided as in the paper: of `afm`, B = U has orthonormal columns and b + W E[x] - U Uᵀ W E[x] becomes Uᵀ b before
the activation and (I - U Uᵀ) E[y] after it. The values change: train afterwards. Running it twice changes nothing the
second time.
Source: Yu et al. (2024), arXiv:2405.18146, whose released models have a ReLU there.
"""

from typing import Literal

import torch
from pydantic import Field

from lrc.maps import ACTIVATIONS, Activation, Chain, Dense, LinearMap
from lrc.program import Site
from lrc.run import Keep, PassOptions, Rewrite, Statistics, site_pass


class Activate(PassOptions):
    """Put an activation between the two factors of every product of two matrices."""

    type: Literal["activate"] = "activate"
    function: Literal[*ACTIVATIONS] = Field(  # type: ignore[valid-type]  # the list of functions is one mapping
        default="relu", description="What every number between the factors goes through."
    )


@site_pass(Activate)
def activate(site: Site, statistics: Statistics, options: Activate) -> Rewrite | Keep:
    """Chain(B, A) -> Chain(B, Activation, A), the bias divided between both factors."""
    made = site.map
    if not isinstance(made, Chain) or len(made.slots) != 2 or any(isinstance(slot, LinearMap) for slot in made.slots):
        return Keep(f"no product of two matrices (`factorize` with `form: two_factor` makes one): {made!r}")
    B, A = (slot.detach() for slot in made.slots if isinstance(slot, torch.Tensor))
    inner, outer = None, made.bias
    if made.bias is not None:
        bias = made.bias.detach().double()
        share = torch.linalg.pinv(B.double()) @ bias
        inner, outer = share.to(B.dtype), torch.nn.Parameter((bias - B.double() @ share).to(B.dtype))
    between = Activation(options.function, len(A), A.dtype)
    note = f"not what was factorized until it is trained: {between.obstacle()}"
    return Rewrite(Chain(B.clone(), between, Dense(A.clone(), inner), bias=outer), (note,))
