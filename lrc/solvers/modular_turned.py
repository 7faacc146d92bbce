"""Queries and keys that no rotary embedding turns, in a basis in which their features matter one after the other.

(M q)ᵀ (N k) = qᵀ k for every q and k where Mᵀ N = I: a head may have any such basis.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrc.solvers.groups import Member, WeightGroup
from lrc.solvers.ladder import root
from lrc.solvers.modular_reader import blocks


def turned(group: WeightGroup, outputs: Sequence[Tensor], damping: float) -> WeightGroup:
    """Return the group with every head of keys, and the queries that share it, in their joint basis.

    outputs: E[q qᵀ] and E[k kᵀ] of all features. Of a head they are Lq Lqᵀ (the sum over the queries that share its keys) and
    Lk Lkᵀ, damped. With Lqᵀ Lk = U S Vᵀ, M = S^½ Uᵀ Lq⁻¹ and N = S^½ Vᵀ Lk⁻¹: both then have the second moment S, and the
    first r features are the part of rank r of qᵀ k with the least mean squared error over independent queries and keys, the
    sum of S[r:]². What the outputs' gradients cost is turned along, by N and M.
    Source: Lin et al. (2025), MoDeGPT, arXiv:2408.09632, for the pair; Eckart & Young (1936), doi:10.1007/BF02288367, for the
    best one. Departure: the paper selects features as they are, which a rotary embedding asks for and other models do not.
    """
    q, k = group.members
    size, kv_heads = group.facts["size"], group.facts["kv_heads"]
    shared = group.facts["heads"] // kv_heads
    of_queries: list[Tensor] = []
    of_keys: list[Tensor] = []
    for head in range(kv_heads):
        Lk = root(_block(outputs[1], head, size), "keys", damping)
        queries = [_block(outputs[0], head * shared + i, size) for i in range(shared)]
        Lq = root(torch.stack(queries).sum(0), "queries", damping)
        U, S, Vh = torch.linalg.svd(Lq.matrix.T @ Lk.matrix)
        scale = S.sqrt()[:, None]
        of_queries += [scale * Lq.solve(U.T)] * shared
        of_keys.append(scale * Lk.solve(Vh))
    duals = [M for i, M in enumerate(of_queries) if i % shared == 0], [N for N in of_keys for _ in range(shared)]
    members = _turned(q, of_queries, duals[1]), _turned(k, of_keys, duals[0])
    return replace(group, members=members)


def _block(moment: Tensor, head: int, size: int) -> Tensor:
    own = slice(head * size, (head + 1) * size)
    return moment[own, own]


def _turned(member: Member, bases: Sequence[Tensor], duals: Sequence[Tensor]) -> Member:
    """Return a linear with its features in other bases; duals: those of its outputs' gradients."""
    basis, dual = blocks(bases), blocks(duals)
    fisher = member.moments.fisher
    moments = member.moments if fisher is None else replace(member.moments, fisher=dual @ fisher.double() @ dual.T)
    bias = None if member.bias is None else (basis @ member.bias.double()).to(member.bias.dtype)
    return replace(member, weight=(basis @ member.weight.double()).to(member.weight.dtype), bias=bias, moments=moments)
