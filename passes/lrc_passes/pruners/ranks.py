"""ranks: components of low-rank products are dropped.

Chain(B, A)           ->  Chain(B', A')              fewer columns of B and rows of A
Sum(W, Chain(B, g, A))  ->  Sum(W, Chain(B', g', A')), or W where no component is left
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lrc.maps import Chain, Composite, Conv, Diagonal, Gate, LinearMap, Scale, rebuilt
from lrc.maps.base import Slot, slot_exact
from lrc.maps.drop import drop_empty_terms, holds_numbers, inner_bias
from lrc.maps.fold import alike, pointwise
from lrc.maps.simplify import unwrap_single
from lrc.program import Program, Site
from lrc.ranks import (
    BreakevenRank,
    EnergyRank,
    FixedRank,
    FlopsKept,
    FractionRank,
    ParamsKept,
    RankField,
    RankPolicy,
    SiteCurve,
    allocate_ranks,
)
from lrc.run import Decision, Keep, Rewrite, Session
from lrc.run.pruners import PrunerOptions, pruner
from lrc.run.selection import select_sites
from lrc.run.site_pass import carried_out, put
from lrc.run.summary import summarize
from lrc.solvers.checks import check_finite

if TYPE_CHECKING:
    from lrc_passes.prune import Prune

POLICIES: tuple[type[RankPolicy], ...] = (FixedRank, FractionRank, BreakevenRank, EnergyRank, ParamsKept, FlopsKept)


class Ranks(PrunerOptions):
    """Drop components of products."""

    type: Literal["ranks"] = "ranks"
    criterion: Literal["gates", "order", "singular"] = Field(
        default="gates",
        description="gates: the smallest gates go, those at exactly zero whatever `rank` is (SoRA); order: the last components "
        "(Maestro); singular: the smallest singular directions of the product.",
    )
    rank: RankField | None = Field(
        default=None,
        description="What stays: a whole number, {fraction: …}, {breakeven: …}, {energy: …} of the product's square, or "
        "{params_kept: …}, {flops_kept: …} of all products together; without it the gates at zero go, and nothing else.",
    )

    @model_validator(mode="after")
    def _amount_that_the_method_has(self) -> Self:
        if self.rank is None and self.criterion != "gates":
            raise ValueError(f"the criterion `{self.criterion}` orders components; give `rank`, how many stay")
        if self.rank is not None and not isinstance(self.rank, POLICIES):
            raise ValueError(
                f"components are counted; give `rank` as a whole number or by {', '.join(map(key_of, POLICIES[1:]))}"
            )
        return self


def key_of(policy: type[RankPolicy]) -> str:
    """Return the key that a spec names a policy by."""
    return next(iter(policy.model_fields))


@dataclass(frozen=True)
class Components:
    """A product as components in the order in which they stay, the first one longest.

    B: (out_features, k), A: (k, in_features), gate: (k,) or None, all float64. losses: squared error of the site's weight with
    the first r of them, r = 0 … k. zeros: gates at zero, whose components go without a trace.
    """

    chain: Chain
    B: Tensor
    A: Tensor
    gate: Tensor | None
    losses: Tensor
    zeros: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.A)

    def first(self, rank: int) -> Chain:
        """Return the product of the first `rank` components, in the dtype and form of the whole one."""
        outer, *middle, inner = self.chain.slots
        parts = [like(outer, self.B[:, :rank])]
        if self.gate is not None:
            (gate,) = middle
            assert isinstance(gate, Diagonal), "checked where components are found"
            made = type(gate)(self.gate[:rank].to(gate.diagonal.dtype), spatial=gate.spatial)
            parts.append(made.requires_grad_(gate.diagonal.requires_grad))
        parts.append(like(inner, self.A[:rank]))
        names = self.chain.names if len(parts) == len(self.chain.names) else None
        return Chain(*parts, bias=self.chain.bias, names=names)


def like(slot: Slot, weight: Tensor) -> Tensor | LinearMap:
    """Return other numbers as the matrix, kernel or table that a slot is, trained where it is."""
    if not isinstance(slot, LinearMap):
        return nn.Parameter(weight.to(slot.dtype).contiguous(), requires_grad=slot.requires_grad)
    weight = weight.to(slot.dtype).contiguous()
    if isinstance(slot, Conv):  # which may have fewer channels to read
        made: LinearMap = Conv(weight.reshape(len(weight), -1, *slot.weight.shape[2:]), slot.geometry)
    else:
        made = alike(slot, weight, None)
    return made.requires_grad_(any(p.requires_grad for p in slot.parameters()))


def product_in(made: LinearMap, scale: float = 1.0) -> list[tuple[Chain, float]]:
    """Return the products in a map that have components, and the constants before them."""
    if isinstance(made, Chain):
        outer, *middle, inner = made.slots
        simple = len(made.slots) >= 2 and all(holds_numbers(slot) for slot in (outer, inner)) and pointwise(outer)
        plain = not middle or (len(middle) == 1 and isinstance(middle[0], Diagonal))
        if simple and plain and not any(isinstance(slot, LinearMap) and inner_bias(slot) for slot in made.slots):
            return [(made, scale)]
    scale = scale * made.scale if isinstance(made, Scale) else scale
    slots = made.slots if isinstance(made, Composite) else ()
    return [found for slot in slots if isinstance(slot, LinearMap) for found in product_in(slot, scale)]


def components(made: LinearMap, criterion: str) -> Components | Keep:
    """Return the components of the one product in a map, or the reason why there are none; SolverError if one is not finite."""
    found = product_in(made)
    if len(found) != 1:
        return Keep(f"{'several products' if found else 'no product of two factors'} in {made!r}")
    (chain, scale) = found[0]
    outer, *middle, inner = chain.slots
    if criterion == "gates" and not (middle and isinstance(middle[0], Gate)):
        return Keep(f"no gate in {made!r}")
    B, A = slot_exact(outer).weight, slot_exact(inner).weight
    for name, factor in (("B", B), ("A", A)):
        check_finite(f"{name} of {made!r}", factor)
    between = middle[0] if middle else None
    gate = between.diagonal.detach().double() if isinstance(between, Diagonal) else None
    if criterion == "singular":
        left, right = torch.linalg.qr(B if gate is None else B * gate), torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        B, A, gate = left.Q @ U * S.sqrt(), S.sqrt()[:, None] * (Vh @ right.Q.T), None
    elif criterion == "gates":
        assert gate is not None, "looked for above"
        order = gate.abs().argsort(descending=True, stable=True)
        B, A, gate = B[:, order], A[order], gate[order]
    zeros = 0 if gate is None or criterion != "gates" else int((gate == 0).sum())
    return Components(chain, B, A, gate, scale**2 * suffix_losses(B if gate is None else B * gate, A), zeros)


def suffix_losses(B: Tensor, A: Tensor) -> Tensor:
    """Return |B[:, r:] A[r:]|² for r = 0 … k, (k + 1,), non-increasing: where components cancel, the largest from there on."""
    products = (B.T @ B) * (A @ A.T)
    size = len(products)
    tails = [float(products[r:, r:].sum()) for r in range(size)]
    losses = torch.tensor([*tails, 0.0], dtype=torch.float64).clamp(min=0)
    return losses.flip(0).cummax(0).values.flip(0)


@pruner(Ranks)
class RanksPruner:
    """Chooses how many components of every product stay, and drops the others."""

    def plan(self, program: Program, session: Session, options: "Prune", index: int) -> Sequence[Decision]:
        """Order the components of every selected site, and let the rank policy choose."""
        method = options.method
        assert isinstance(method, Ranks), "the registry finds the method by its options"
        selected = select_sites(program, session, options, index)
        found = {s.fqn: components(program.sites[s.fqn].map, method.criterion) for s in selected if not s.keep}
        kept, notes = chosen(program, found, method)
        session.notices += notes
        decisions = []
        for choice in selected:
            site = program.sites[choice.fqn]
            before = summarize(site.map)
            decision = Decision(index, options.type, (site.fqn,), choice.rule, before, before)
            made = Keep(choice.keep) if choice.keep else with_first(site, found[choice.fqn], kept.get(choice.fqn))
            decisions.append(carried_out(decision, made))
        return decisions

    def apply(self, program: Program, session: Session, options: "Prune", decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Drop them."""
        method = options.method
        assert isinstance(method, Ranks), "the registry finds the method by its options"
        done = []
        for decision in decisions:
            if decision.keep is not None:
                done.append(decision)
                continue
            (fqn,) = decision.sites
            site, adapted = program.sites[fqn], program.adapters.get(fqn)
            found = components(site.map, method.criterion)
            made = with_first(site, found, decision.rank)
            done.append(put(program, replace(decision, notes=()), made))
            if adapted is not None and decision.rank:  # what is left is the same adapter
                program.adapters[fqn] = replace(adapted, rank=decision.rank)
        program.settle()
        return done


def chosen(program: Program, found: Mapping[str, Components | Keep], method: Ranks) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return how many components stay at every site, and notes; gates at zero never stay."""
    free = {fqn: made for fqn, made in found.items() if isinstance(made, Components)}
    open_ones = {fqn: made.count - made.zeros for fqn, made in free.items()}
    if method.rank is None or not free:
        return open_ones, ()
    curves = [curve_of(program.sites[fqn], made) for fqn, made in free.items()]
    allocation = allocate_ranks(curves, method.rank)
    ranks = {fqn: allocation.choices[fqn].rank for fqn in free}
    return {
        fqn: min(open_ones[fqn], free[fqn].count if rank is None else rank) for fqn, rank in ranks.items()
    }, allocation.notes


def curve_of(site: Site, made: Components) -> SiteCurve:
    """Return what a rank policy looks at: the product alone, whose numbers are those of its two factors."""
    m, n, k = made.B.shape[0], made.A.shape[1], made.count
    numbers = k * (m + n)
    now = {"numbers": numbers, "bytes": numbers * site.dtype.itemsize, "flops": 2 * numbers}
    S = (made.losses[:-1] - made.losses[1:]).clamp(min=0).sqrt()
    return SiteCurve(site.fqn, m, n, made.losses, S, form="two_factor", itemsize=site.dtype.itemsize, now=now)  # type: ignore[arg-type]  # units


def with_first(site: Site, found: Components | Keep, rank: int | None) -> Rewrite | Keep:
    """Return the map of a site with the first `rank` components of its product, or the reason why it stays."""
    if isinstance(found, Keep):
        return found
    rank = found.count if rank is None else rank
    alone = found.chain is site.map
    rank = max(1, rank) if alone else rank
    if rank >= found.count:
        return Keep(f"all {found.count} components stay")
    whole = float(found.losses[0])
    error = math.sqrt(float(found.losses[rank]) / whole) if whole else 0.0
    note = f"{rank} of {found.count} components stay: error {error:.2%} of the product"
    return Rewrite(put_in(site.map, found.chain, found.first(rank)), (note,), rank)


def put_in(made: LinearMap, old: Chain, new: Chain) -> LinearMap:
    """Return a map with another product in the place of one; a product without components leaves sums."""
    if made is old:
        return new
    if not isinstance(made, Composite):
        return made
    parts = [put_in(slot, old, new) if isinstance(slot, LinearMap) else slot for slot in made.slots]
    if all(part is slot for part, slot in zip(parts, made.slots, strict=True)):
        return made
    smaller = rebuilt(made, parts)
    without = drop_empty_terms(smaller)
    return smaller if without is None else (unwrap_single(without) or without)
