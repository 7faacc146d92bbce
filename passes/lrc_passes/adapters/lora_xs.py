"""lora_xs: a small trained matrix between two frozen factors.

X  ->  Sum(base: X*, adapter: Scale(s, Chain(B*, R, A*)))      R (r, r) is all that is trained
"""

from typing import ClassVar, Literal

import torch

from lrc.initialisers import InitialiserOptions, SvdWeight
from lrc.maps import LinearMap, Sum
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.parts import branch, constant


class LoraXs(AdapterOptions):
    """A trained core of rank x rank between frozen factors; with `init: lora_sb` it is LoRA-SB."""

    type: Literal["lora_xs"] = "lora_xs"
    default_alpha: ClassVar[float | None] = None
    default_init: ClassVar[InitialiserOptions | None] = SvdWeight()


@adapter(LoraXs)
def lora_xs(place: Place, options: LoraXs) -> LinearMap:
    """X -> X* + s B* R A*; s = alpha / rank, or 1 where no alpha is given.

    Sources: LoRA-XS (2024), arXiv:2405.17604; LoRA-SB (2024), arXiv:2411.19557. Raises ValueError for an initialiser that
    makes no core: between factors of which one is zero nothing would ever be learnt.
    """
    base, initial = place.started()
    core = initial.core
    if place.planning:
        core = torch.empty(place.rank, place.rank, device="meta")
    if core is None:
        raise ValueError("this initialiser makes no core; choose `init: svd_weight` or `init: lora_sb`")
    layout, dtype = place.site.layout, place.site.dtype
    B = layout.pointwise(constant(initial.B.to(dtype)))
    A = layout.dense(constant(initial.A.to(dtype)), None).requires_grad_(False)
    B.requires_grad_(False)
    R = layout.pointwise(core.to(dtype).contiguous())
    made = place.scaled(branch(place, B, R, A, names=("B", "R", "A")))
    return Sum(base, made, bias=place.bias, names=("base", "adapter"))
