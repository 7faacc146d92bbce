"""Basis Sharing: the invariants of its method card."""

import pytest
import torch
from solver_cases import EPS, F64, generator, randn, samples

from lrc.errors import SolverError
from lrc.solvers import BasisSharingSolver, GroupTerms, Member, Moments, WeightGroup, WhitenedSolver, basis_sharing, whitened

TOKENS, OUT, IN = 40, 6, 5


def member(seed: int, out_features: int = OUT) -> Member:
    x = samples(IN, seed, tokens=TOKENS)
    bias = randn(out_features, seed=seed + 50)
    return Member(randn(out_features, IN, seed=seed + 9), bias, Moments(gram=x.T @ x / TOKENS, mean=x.mean(0), tokens=TOKENS))


def solve(*members: Member) -> GroupTerms:
    options = BasisSharingSolver(group_size=len(members))
    return basis_sharing(WeightGroup("alike", members), None, options, generator(0))


def test_a_group_of_one_is_whitened() -> None:
    one = member(0)
    terms = solve(one)
    alone = whitened(one.weight, one.bias, one.moments, IN, WhitenedSolver(center=False), generator(0))
    assert torch.allclose(terms.losses, alone.losses(), rtol=1e-10, atol=1e-12)
    for rank in range(1, IN + 1):
        (part,) = BasisSharingSolver().cut(terms, rank)
        B, A = alone.product(rank)
        assert torch.allclose(part.factors[0] @ part.factors[1], B @ A, atol=1e-8)
        assert torch.equal(part.bias, one.bias)


def test_the_shared_loss_is_the_tail_of_the_stacked_spectrum_and_the_measured_error() -> None:
    members = [member(seed) for seed in (0, 1, 2)]
    terms = solve(*members)
    H = sum(m.moments.gram for m in members) / 3
    S = torch.linalg.svdvals(torch.cat([m.weight for m in members]) @ torch.linalg.cholesky(H))
    tails = torch.stack([S[rank:].square().sum() for rank in range(IN + 1)])
    assert torch.allclose(terms.losses, tails, rtol=1e-9, atol=1e-12)
    for rank in range(1, IN + 1):
        parts = BasisSharingSolver().cut(terms, rank)
        error = 0.0
        for part, one in zip(parts, members, strict=True):
            change = one.weight - part.factors[0] @ part.factors[1]
            error += float((change @ H * change).sum())
        assert error == pytest.approx(float(terms.losses[rank]), rel=1e-8, abs=1e3 * EPS)


def test_the_basis_is_one_tensor_and_full_rank_gives_the_weights_back() -> None:
    members = [member(0), member(1)]
    parts = BasisSharingSolver().cut(solve(*members), IN)
    assert parts[0].factors[1] is parts[1].factors[1]
    for part, one in zip(parts, members, strict=True):
        assert torch.allclose(part.factors[0] @ part.factors[1], one.weight, atol=1e-10)


def test_white_inputs_reduce_it_to_the_svd_of_the_stack() -> None:
    members = [Member(randn(OUT, IN, seed=s), None, Moments(gram=torch.eye(IN, dtype=F64))) for s in (0, 1)]
    S = torch.linalg.svdvals(torch.cat([m.weight for m in members]))
    assert float(solve(*members).losses[2]) == pytest.approx(float(S[2:].square().sum()))


def test_weights_of_other_shapes_and_missing_moments_are_refused() -> None:
    with pytest.raises(SolverError, match="weights of one shape"):
        solve(member(0), member(1, OUT + 1))
    with pytest.raises(SolverError, match=r"moments\.gram"):
        solve(Member(randn(OUT, IN, seed=0), None, Moments()))
