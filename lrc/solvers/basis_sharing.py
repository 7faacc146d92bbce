"""Basis Sharing: one basis for a layer of several blocks that follow each other."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Need, solver
from lrc.solvers.checks import check
from lrc.solvers.groups import Grouping, GroupOptions, GroupTerms, Part, WeightGroup
from lrc.solvers.inputs import input_moment
from lrc.solvers.ladder import root
from lrc.solvers.terms import ordered_terms, storage_dtype
from lrc.solvers.whitened import UNIT


class BasisSharingSolver(GroupOptions):
    """Whitened SVD of alike layers, stacked: each keeps its own coefficients, and the basis of their inputs is stored once."""

    type: Literal["basis_sharing"] = "basis_sharing"
    group_size: int = Field(default=2, ge=1, description="Blocks whose layers share a basis; 1 is `whitened`.")
    share: Literal["inner", "all"] = Field(
        default="inner",
        description="Which layers share: all but those whose output is added back to the stream of blocks (the paper), or all.",
    )
    damping: float = Field(default=0.0, ge=0, description="Added to the second moment's diagonal, of its mean.")
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})
    grouping: ClassVar[Grouping] = Grouping.ALIKE
    form: ClassVar[str] = "shared_basis"

    def cut(self, terms: GroupTerms, rank: int) -> Sequence[Part]:
        """Return the products with the first `rank` coefficients of each layer and the first `rank` rows of the basis."""
        A = terms.tensors["A"][:rank]
        B = terms.tensors["B"][:, :rank].tensor_split(terms.facts["layers"])
        return [Part((part, A), terms.tensors.get(f"bias{i}")) for i, part in enumerate(B)]


@solver(BasisSharingSolver)
def basis_sharing(
    group: WeightGroup, max_rank: int | None, options: BasisSharingSolver, generator: torch.Generator
) -> GroupTerms:
    """Return the terms that minimise the sum over layers of E||W_i x - B_i A x||², x of all layers' inputs together.

    W = [W_1; …; W_n], (n * out_features, in_features), L Lᵀ the mean of the layers' second moments, U S Vᵀ = svd(W L):
    A (rank, in_features) is stored once, B_i (out_features, rank) are the layer's rows of B. The loss at rank r, the sum of
    S[r:]², is the squared output error per token, summed over layers, of inputs that all of them share.
    Computed in float64. Raises SolverError on statistics that are missing, misshapen or not finite.
    Source: Wang et al. (2025), Basis Sharing, arXiv:2410.03765, section 3, with W as (out_features, in_features), so that
    their basis is our Aᵀ. Departures: A is not formed with L⁻¹, nor the coefficients refitted behind compressed layers.
    """
    for member in group.members:
        check(member.weight, member.bias, member.moments, max_rank or 1, options.needs)
    shapes = {tuple(member.weight.shape) for member in group.members}
    if len(shapes) > 1:
        raise SolverError("group", expected="weights of one shape", got=", ".join(map(str, sorted(shapes))))
    weights = [member.weight.double() for member in group.members]
    moments = [input_moment(member.moments, center=False) for member in group.members]
    mean: Tensor = torch.stack(moments).mean(0)
    L = root(mean, "gram", options.damping)
    stacked = torch.cat(weights)
    full = min(stacked.shape)
    found = ordered_terms(stacked, None, L, min(full, max_rank or full), storage_dtype(group.members[0].weight))
    tensors = {"A": found.A, "B": found.B}
    tensors |= {f"bias{i}": m.bias for i, m in enumerate(group.members) if m.bias is not None}
    losses = L.weight * found.losses()
    return GroupTerms(losses, tensors, {"layers": len(weights)}, UNIT, L.notes)
