"""plp: LoRA whose factors are frozen in one half; two such adapters, trained apart, are put together.

X  ->  Sum(base: X*, adapter: Scale(s, Chain(B: Blocks(B_f*, B_l), A: Blocks(A_f*, A_l))))

A = [A_f | A_l], B = [B_f ; B_l]: the block B_f A_f of the update never changes. `made` takes B and A_f of one adapter and
A_l of the other.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers import Initial, InitialiserOptions
from lrc.maps import Blocks, Chain, LinearMap, Scale, Sum
from lrc.program import Site
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.parts import branch, constant, normal


class Plp(AdapterOptions):
    """Partly learnable projections: halves of both factors are frozen, orthogonal where the weight is square."""

    type: Literal["plp"] = "plp"
    basis: int | None = Field(default=None, ge=1, description="Rows of the orthogonal basis; without, as many as the features.")
    train: Literal["both", "up", "down"] = Field(default="both", description="Which of the learnable halves are trained.")
    zero_init: bool = Field(
        default=False,
        description="Take the start of the adapter out of the frozen weight, so that nothing changes; the authors do not.",
    )
    default_rank: ClassVar[int] = 64
    default_alpha: ClassVar[float | None] = None
    default_init: ClassVar[InitialiserOptions | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def obstacle(self, site: Site, rank: int) -> str | None:
        """Return why there is no orthogonal basis of the rank, where there is none."""
        square = site.out_features == site.in_features
        rows = self.basis or site.in_features
        if square and rank > rows:
            return f"a basis of {rows} rows has no {rank} orthonormal columns"
        if square and rows - site.in_features // 2 < site.out_features // 2:
            return f"a basis of {rows} rows has no two disjoint halves of {site.in_features} features"
        return super().obstacle(site, rank)


@adapter(Plp)
def plp(place: Place, options: Plp) -> LinearMap:
    """X -> X* + s B A, frozen in halves. Source: Xu et al. (2024), arXiv:2403.19456, section 4, and the authors' code.

    Square weights: A_f and B_f are disjoint rows of one random basis with orthonormal columns; so B A is not zero at the start.
    Others: B is zero and A normal with deviation 1 / rank. A_l is normal likewise, B_l zero.
    """
    m, n, rank, dtype = place.site.out_features, place.site.in_features, place.rank, place.site.dtype
    A_l = normal(place, rank, n - n // 2, std=1 / rank)
    if m == n:
        B_f, A_f = halves(place, options.basis or n)
    else:
        B_f, A_f = torch.zeros(m // 2, rank), normal(place, rank, n // 2, std=1 / rank)
    B = Blocks(constant(B_f.to(dtype)), torch.zeros(m - m // 2, rank, dtype=dtype), "out")
    A = Blocks(constant(A_f.to(dtype)), A_l.to(dtype), "in")
    for part, other in ((B, "down"), (A, "up")):
        part.second.requires_grad_(options.train != other)
    made = branch(place, B, A)
    base = place.base()
    if options.zero_init and not place.planning:
        start = B.matrix().detach(), A.matrix().detach()
        base = place.changed_base(place.site.map.exact().weight - place.scaling * B.exact().weight @ A.exact().weight)
        place.initial = Initial(*start, subtracted=True)
    return Sum(base, place.scaled(made), bias=place.bias, names=("base", "adapter"))


def halves(place: Place, rows: int) -> tuple[Tensor, Tensor]:
    """Return B_f (features // 2, rank) and A_f (rank, features // 2): disjoint rows of a basis of orthonormal columns."""
    half = place.site.in_features // 2
    Q, R = torch.linalg.qr(normal(place, rows, place.rank))
    Q = Q * R.diagonal().sign()
    order = torch.randperm(rows, generator=place.generator)
    content, style = order[:half], order[half:].sort().values[:half]
    return Q[style], Q[content].T


def made(style: LinearMap, content: LinearMap) -> LinearMap:
    """Return the adapter of `style` with the learnable half of the content adapter's A: B and A_f are those of `style`.

    Both are what `plp` put at one site, trained apart. Raises ValueError for anything else, and for other sizes.
    """
    (branch_s, B_s, A_s), (_, _, A_c) = parts_of(style), parts_of(content)
    if A_s.second.shape != A_c.second.shape:
        raise ValueError(f"adapters of other sizes: {style!r} and {content!r}")
    A = Blocks(A_s.first, torch.nn.Parameter(A_c.second.detach().clone()), "in", A_s.bias)
    inner = branch_s.slots[0]
    assert isinstance(inner, Chain)
    slots = [A if slot is A_s else B_s if slot is B_s else slot for slot in inner.slots]
    joined = Scale(Chain(*slots, bias=inner.bias, names=inner.names), branch_s.scale, branch_s.bias, branch_s.names)
    assert isinstance(style, Sum)
    return Sum(style.slots[0], joined, bias=style.bias, names=style.names)


def parts_of(made: LinearMap) -> tuple[Scale, Blocks, Blocks]:
    """Return the branch of an adapter, and its B and A."""
    found = made.slots[1] if isinstance(made, Sum) and len(made.slots) == 2 else None
    inner = found.slots[0] if isinstance(found, Scale) else None
    blocks = [slot for slot in inner.slots if isinstance(slot, Blocks)] if isinstance(inner, Chain) else []
    if not isinstance(found, Scale) or len(blocks) != 2:
        raise ValueError(f"expected an adapter that `method: plp` has made, got {made!r}")
    return found, blocks[0], blocks[1]
