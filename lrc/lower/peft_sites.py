"""What PEFT stores of one site, taken from a map, and put together to one again."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.maps import Chain, ConvChain, Dropout, Identity, LinearMap, Lookup, RowNorm, Scale, Sum, frozen_base
from lrc.maps.base import Slot, slot_exact, slot_weight
from lrc.maps.low_rank import low_rank
from lrc.program import Site


@dataclass(frozen=True)
class Factors:
    """An adapter `scaling * B @ A` of one site: B (out_features, rank), A (rank, in_features).

    magnitude: the lengths of the rows of the sum, (out_features,), or None.
    """

    B: Tensor
    A: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]


def split(made: LinearMap, fqn: str) -> tuple[Slot, Factors]:
    """Return the base of an adapted map, and the adapters on it as one.

    Raises LowerError where the map is no sum of a base and products of two matrices.
    """
    if isinstance(made, RowNorm):
        base, found = split(whole(made.slots[0], fqn), fqn)
        return base, Factors(found.B, found.A, found.scaling, made.magnitude.detach())
    if is_followed(made):
        return followed(made, fqn)
    if not isinstance(made, Sum) or len(made.slots) < 2:
        raise no_lora(fqn, made)
    base, *branches = made.slots
    factors = [factors_of(branch, fqn) for branch in branches]
    if isinstance(base, Sum | RowNorm) or is_followed(base):
        base, inner = split(base, fqn)
        if inner.magnitude is not None:
            raise no_lora(fqn, made)
        factors.insert(0, inner)
    return base, joined(factors)


def is_followed(made: Slot) -> TypeGuard[Chain]:
    """Say whether a map is Chain(Sum(I, branch), base): a base with a branch after it."""
    if not isinstance(made, Chain) or len(made.slots) != 2:
        return False
    after = made.slots[0]
    return isinstance(after, Sum) and len(after.slots) == 2 and isinstance(after.slots[0], Identity)


def followed(made: Chain, fqn: str) -> tuple[Slot, Factors]:
    """Return the base, and the branch after it as one beside it: (I + s D C) W = W + s D (C W), of the rank of C.

    What the branch makes of biases is no part of the factors.
    """
    after, base = made.slots
    assert isinstance(after, Sum), "as `is_followed` says"
    found = factors_of(after.slots[1], fqn)
    return base, Factors(found.B, found.A.double() @ slot_exact(base).weight, found.scaling)


def whole(slot: Slot, fqn: str) -> LinearMap:
    """Return a slot that is a map. Raises LowerError for a bare matrix."""
    if not isinstance(slot, LinearMap):
        raise LowerError(fqn, message="the map has no adapter")
    return slot


def no_lora(fqn: str, made: LinearMap) -> LowerError:
    """Return the error of a map that PEFT knows no form of."""
    return LowerError(
        fqn, message=f"PEFT has no adapter of the form {made!r}", hint="Merge it (`type: merge`) and export the model"
    )


def joined(factors: list[Factors]) -> Factors:
    """Return several adapters as one: side by side, scaled alike."""
    first, *rest = factors
    if not rest:
        return first
    dtype = torch.promote_types(first.B.dtype, max((f.A.dtype for f in factors), key=lambda d: d.itemsize))
    B = torch.cat([f.B.to(dtype) * (f.scaling / first.scaling) for f in factors], 1)
    return Factors(B, torch.cat([f.A.to(dtype) for f in factors], 0), first.scaling)


def factors_of(branch: Slot, fqn: str) -> Factors:
    """Return the two factors of a branch: as they are stored where it is a product of two, else multiplied out.

    What it adds by biases is no part of them. Raises LowerError for a branch that is not linear, or no product.
    """
    scaling = 1.0
    while isinstance(branch, Scale) and branch.bias is None:
        scaling, branch = scaling * branch.scale, branch.slots[0]
    if isinstance(branch, Chain) and branch.bias is None:
        kept = [slot for slot in branch.slots if not isinstance(slot, Dropout)]
        if len(kept) == 2 and all(not isinstance(slot, LinearMap) or isinstance(slot, Lookup) for slot in kept):
            B, A = (slot_weight(slot).detach() for slot in kept)  # of any rank, higher than the weight's own too
            return Factors(B, A, scaling)
        branch = kept[0] if len(kept) == 1 else branch
    if isinstance(branch, ConvChain) and len(branch.kernels) == 2:
        B, A = branch.kernels
        return Factors(B.detach().flatten(1), A.detach().flatten(1), scaling)
    found = low_rank(branch) if isinstance(branch, LinearMap) else None
    if found is None:
        raise LowerError(
            fqn, message="the adapter is no product of two matrices, so PEFT cannot hold it",
            hint="Merge it (`type: merge`) and export the model",
        )  # fmt: skip
    return Factors(found.B, found.A, scaling * found.scale)


def doubled(now: Factors, initial: tuple[Tensor, Tensor]) -> Factors:
    """Return an adapter of twice the rank that holds on the untouched base what `now` is on a base without `initial`.

    s (B A - B0 A0) = s [B, -B0] [A; A0]: the change of the base is given back.
    """
    B0, A0 = (t.to(now.B) for t in initial)
    return Factors(torch.cat([now.B, -B0], 1), torch.cat([now.A, A0], 0), now.scaling)


def peft_tensors(prefix: str, site: Site, factors: Factors) -> dict[str, Tensor]:
    """Return the tensors by PEFT's names, float32, contiguous."""
    B, A, magnitude = factors.B, factors.A, factors.magnitude
    if site.kind == "embedding":
        named = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        if site.kind == "conv":
            kernel = site.layout.kernel  # type: ignore[attr-defined]  # of the layout of a convolution
            A, B = A.reshape(A.shape[0], -1, *kernel), B.reshape(*B.shape, *(1,) * len(kernel))
            magnitude = None if magnitude is None else magnitude.reshape(1, -1, *(1,) * len(kernel))
        named = {"lora_A.weight": A, "lora_B.weight": B}
    if magnitude is not None:
        named["lora_magnitude_vector"] = magnitude
    return {f"{prefix}.{name}": tensor.detach().float().contiguous() for name, tensor in named.items()}


def adapted_map(
    site: Site,
    factors: Factors,
    base: LinearMap | None = None,
    dropout: float = 0.0,
    standing: LinearMap | None = None,
    trained_bias: Tensor | None = None,
) -> LinearMap:
    """Return the site's map with an adapter on it.

    standing: what counts as being there, in place of what is; base: what becomes of that under the adapter, in place of its
    weight as it is; trained_bias: in place of its bias.
    """
    B, A = (t.to(site.dtype).contiguous() for t in (factors.B, factors.A))
    branch: LinearMap = site.layout.product(B, A, None)
    if dropout and site.kind != "embedding":
        left_out = Dropout(site.in_features, dropout, site.dtype)
        inner = branch.slots if isinstance(branch, Chain) else (branch,)
        branch = Chain(*inner, left_out, names=("B", "A", "dropout") if isinstance(branch, Chain) else ("kernels", "dropout"))
    under = site.map if standing is None else standing
    bias: Tensor | None = None
    if trained_bias is not None:
        bias = nn.Parameter(trained_bias.to(site.dtype).clone())
    elif under.bias is not None:
        bias = nn.Parameter(under.bias.detach(), requires_grad=False)
    added = (frozen_base(under) if base is None else base, Scale(branch, factors.scaling))
    if factors.magnitude is None:
        return Sum(*added, bias=bias, names=("base", "adapter"))
    return RowNorm(Sum(*added, names=("base", "adapter")), factors.magnitude.flatten().to(site.dtype), bias)
