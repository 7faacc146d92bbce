"""MoDeGPT: the linears of an MLP or an attention lose the same features, and the one that reads them makes up for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from lrc.solvers.base import Need, solver
from lrc.solvers.checks import check
from lrc.solvers.fisher import FocusOptions, focused
from lrc.solvers.groups import Grouping, GroupOptions, GroupTerms, Part, Places, WeightGroup
from lrc.solvers.modular_fused import cut_fused, fused_attention
from lrc.solvers.modular_pairs import queries_and_keys
from lrc.solvers.modular_reader import read_back


class ModularSolver(GroupOptions, FocusOptions):
    """Modules in place of matrices: fewer neurons of an MLP, fewer features of an attention's heads."""

    type: Literal["modular"] = "modular"
    metric: Literal["loss", "outputs"] = Field(
        default="loss",
        description="What an error of a module's output counts: as the loss sees it in second order, or the same in all "
        "directions (the paper).",
    )
    select: Literal["saliency", "leverage"] = Field(
        default="saliency",
        description="Which neurons of an MLP stay: those whose loss cannot be made up for by the others, or those of the "
        "largest ridge leverage scores (the paper).",
    )
    queries: Literal["auto", "features"] = Field(
        default="auto",
        description="What queries and keys keep: some of their features as they are (the paper), or by auto, where no rotary "
        "embedding turns them, the leading ones of the basis in which their scores lose least.",
    )
    damping_in: float = Field(
        default=1e-2, ge=0, description="Added to the diagonal of activations' second moment, of its mean."
    )
    damping_out: float = Field(default=1.0, ge=0, description="Added to the diagonal of gradients' second moment, of its mean.")
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS, Need.GRADIENTS})
    grouping: ClassVar[Grouping] = Grouping.MODULES
    form: ClassVar[str] = "modular"

    def cut(self, terms: GroupTerms, rank: int) -> Sequence[Part]:
        """Return the linears with the first `rank` units: neurons of an MLP, features of values, pairs of queries and keys."""
        if terms.facts.get("fused"):
            return cut_fused(terms, rank, self.cut)
        tensors, facts = terms.tensors, terms.facts
        made = [_written(terms, i, rank * facts[f"rows{i}"]) for i in range(facts["writers"])]
        if not facts["reads"]:
            return made
        count = rank * facts["reads"]
        solved = torch.linalg.solve_triangular(
            tensors["L"][:count, :count].double(), tensors["ML"][:, :count].double(), upper=False, left=False
        )
        bias = tensors.get("reader_bias")
        if "mean" in tensors:
            shift = tensors["target"] - solved @ tensors["mean"][:count]
            bias = shift if bias is None else shift + bias
        places, order = tensors["reads"][:count].sort()
        reader = solved[:, order].to(tensors["ML"].dtype)
        return [*made, Part((reader, Places(places, facts["width"], spread=False)), bias)]


def _written(terms: GroupTerms, writer: int, count: int) -> Part:
    """Return the linear that gives its first `count` rows, each at its place."""
    tensors = terms.tensors
    places, order = tensors[f"places{writer}"][:count].sort()
    bias = tensors.get(f"bias{writer}")
    where = Places(places, terms.facts[f"size{writer}"], spread=True)
    return Part((where, tensors[f"W{writer}"][:count][order]), None if bias is None else bias[:count][order])


@solver(ModularSolver)
def modular(group: WeightGroup, max_rank: int | None, options: ModularSolver, generator: torch.Generator) -> GroupTerms:
    """Return the units of a module in the order in which they are kept, and the least loss with the first r of them.

    mlp: writers (d_ff, in_features) and the reader (out_features, d_ff). Neurons are selected, and the reader is the least
    squares of its own output on those that stay: W[:, J]' = W C[:, J] C[J, J]⁻¹, C = E[z zᵀ] of what it reads. vo: each head's
    values turn into the directions of W_o z that cost most, with C its block of E[z zᵀ] (for heads that share values, the mean
    of their blocks); the best ones of all heads are kept, and W_o is the least squares as in an MLP. qk: features of queries
    and keys are kept by |q_j| |k_j| in the mean square, those together that a rotary embedding turns; without one, in the
    basis of `modular_turned`. qkvo: one linear gives queries, keys and values, and both are kept by what they lose per number.
    With C = L Lᵀ in the order of the units, the loss with the first r is the sum over later columns of |Kᵀ W L|², K Kᵀ the
    output gradients' second moment; in nats per token with `metric: loss`. Of queries and keys it is that of the dropped
    features, 1/2 sum of G ∘ C, the mean of both sides. Computed in float64.
    Source: Lin et al. (2025), MoDeGPT, arXiv:2408.09632, algorithms 1 (MLP, Nyström), 2 (queries and keys, CR) and 3 (values
    and output, SVD). Departures: C of values is that of what W_o reads, behind the softmax, where the paper takes the block's
    input; heads may keep different numbers of features; saliency (Hassibi & Stork 1992, optimal brain surgeon) selects neurons
    unless `select: leverage`; a reader with a bias keeps the mean of what is dropped; a budget takes the place of their
    block influence; queries and keys in another basis (`queries`).
    """
    for member in group.members:
        check(member.weight, member.bias, member.moments, max_rank or 1, options.needs)
    if options.metric == "loss":
        focus = float(options.settled(logits=True).focus)
        members = tuple(replace(member, moments=focused(member.moments, focus)) for member in group.members)
        group = replace(group, members=members)
    if group.kind == "qkvo":
        return fused_attention(group, options)
    if group.kind == "qk":
        return queries_and_keys(group, options)
    return read_back(group, options)
