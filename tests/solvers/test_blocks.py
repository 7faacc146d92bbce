"""A weight in groups: every block is decomposed by itself, and they lose together what each of them loses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from solver_cases import F64, generator, randn

from lrc.solvers import Moments, kfac, solve_blocks, svd, whitened

GROUPS, SHAPE = 3, (4, 5)


def moments() -> Moments:
    X, g = randn(60, GROUPS, SHAPE[1], seed=1) + 0.5, randn(60, GROUPS * SHAPE[0], seed=2)
    gram = torch.einsum("tgi,tgj->gij", X, X) / len(X)
    return Moments(gram=gram, mean=X.mean(0), fisher=g.T @ g / len(g), tokens=len(X))


@pytest.mark.parametrize("rule", [svd, whitened, kfac], ids=lambda rule: rule.name)
@pytest.mark.parametrize("biased", [False, True])
def test_groups_together_are_groups_alone(rule: Any, biased: bool) -> None:
    W = randn(GROUPS * SHAPE[0], SHAPE[1], seed=0)
    bias = randn(len(W), seed=3) if biased else None
    options, given = rule.options(), moments()
    whole = solve_blocks(rule.function, W, bias, given, 4, options, generator(0), GROUPS)
    assert whole.A.shape == (4, GROUPS, SHAPE[1])
    losses = torch.zeros(5, dtype=F64)
    for group in range(GROUPS):
        rows = slice(group * SHAPE[0], (group + 1) * SHAPE[0])
        assert given.gram is not None
        assert given.mean is not None
        assert given.fisher is not None
        own = replace(given, gram=given.gram[group], mean=given.mean[group], fisher=given.fisher[rows, rows])
        alone = rule(W[rows], None if bias is None else bias[rows], own, 4, options, generator(0))
        losses += alone.losses()
        for rank in (1, 3):
            B, A, added = whole.truncate(rank, F64)
            factors = alone.truncate(rank, F64)
            assert torch.allclose(B[rows] @ A[:, group], factors.B @ factors.A, rtol=0, atol=1e-12)
            if factors.bias is None:
                assert added is None
            else:
                assert added is not None
                assert torch.allclose(added[rows], factors.bias, rtol=0, atol=1e-12)
    assert torch.allclose(whole.losses(), losses, rtol=1e-12, atol=1e-12 * float(losses[0]))
