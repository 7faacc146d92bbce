"""Splitters: what each promises of its parts, on matrices small enough to check."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.errors import SolverError
from lrc.formats import FORMATS, Integer
from lrc.solvers import Moments
from lrc.solvers.splits import (
    GodecSplitter,
    LoftqSplitter,
    LqSplitter,
    OatsSplitter,
    PcpSplitter,
    SlimSplitter,
    SltrainSplitter,
    Split,
    godec,
    loftq,
    lq,
    oats,
    pcp,
    slim,
    sltrain,
)  # fmt: skip
from lrc.solvers.splits.lq import plain_error
from lrc.solvers.splits.support import strongest

F64 = torch.float64


def randn(*size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments(n: int, seed: int = 5) -> Moments:
    x = randn(4 * n, n, seed=seed) * torch.linspace(0.1, 3, n, dtype=F64)
    return Moments(gram=x.T @ x / len(x), tokens=len(x))


def run(rule: Any, weight: Tensor, rank: int, options: Any, seen: Moments | None = None) -> Split:
    found: Split = rule(weight, seen or Moments(), rank, options, torch.Generator().manual_seed(0))
    return found


def whole(found: Split) -> Tensor:
    return found.B @ found.A + found.rest


def falls(history: tuple[float, ...]) -> bool:
    return all(b <= a * (1 + 1e-12) for a, b in pairwise(history))


def test_pcp_recovers_a_planted_split() -> None:
    L = randn(100, 5) @ randn(5, 100, seed=1)
    S = torch.zeros(100, 100, dtype=F64)
    chosen = torch.randperm(10_000, generator=torch.Generator().manual_seed(2))[:500]
    S.view(-1)[chosen] = 10 * randn(500, seed=3).sign()
    found = run(pcp, L + S, 20, PcpSplitter())
    assert found.A.shape[0] == 5
    assert float((found.B @ found.A - L).norm() / L.norm()) < 1e-6
    assert float((found.rest - S).norm() / S.norm()) < 1e-6
    assert found.notes == ()


def test_pcp_reaches_the_objective_that_tensorly_does() -> None:
    decomposition = pytest.importorskip("tensorly.decomposition", reason="skipped: comparison with tensorly, not installed")
    W = randn(30, 4) @ randn(4, 24, seed=1) + 0.1 * randn(30, 24, seed=2)
    W[::7, ::5] += 6
    lam = 30**-0.5
    theirs = decomposition.robust_pca(  # its nuclear norm is that of both unfoldings
        W.numpy(), reg_E=lam, reg_J=0.5, learning_rate=1.05, n_iter_max=2000, tol=1e-9, verbose=0
    )
    found = run(pcp, W, 24, PcpSplitter(iterations=1000))

    def objective(low: Tensor, sparse: Tensor) -> float:
        assert float((low + sparse - W).norm()) < 1e-5 * float(W.norm())
        return float(torch.linalg.matrix_norm(low, "nuc") + lam * sparse.abs().sum())

    assert objective(found.B @ found.A, found.rest) <= 1.01 * objective(*(torch.from_numpy(part) for part in theirs))


def test_pcp_says_what_it_cuts() -> None:
    found = run(pcp, randn(20, 30), 3, PcpSplitter(density=0.1))
    assert found.A.shape[0] == 3
    assert int((found.rest != 0).sum()) <= 60
    assert next(note.split(" cut to ")[1] for note in found.notes if " cut to " in note) == "3"


@pytest.mark.parametrize("pattern", ["all", "rows", "2:4"])
def test_godec_and_oats_never_get_worse_and_keep_their_counts(pattern: str) -> None:
    W = randn(24, 32)
    density = None if pattern == "2:4" else 0.25
    for rule, options, seen in (
        (godec, GodecSplitter(pattern=pattern, density=density, iterations=15, tolerance=0), None),
        (oats, OatsSplitter(pattern=pattern, density=density, iterations=15), moments(32)),
    ):
        found = run(rule, W, 4, options, seen)
        assert len(found.history) == 15
        assert falls(found.history)
        kept = (found.rest != 0).int()
        if pattern == "2:4":
            assert kept.reshape(24, 8, 4).sum(-1).unique().tolist() == [2]
        elif pattern == "rows":
            assert kept.sum(1).unique().tolist() == [8]
        else:
            assert int(kept.sum()) == 192


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
def test_warm_steps_end_where_whole_decompositions_do(pattern: str) -> None:
    """Against the loop of the papers, written out with an SVD an iteration; each ends in a local minimum of its own."""
    seen = moments(48)
    assert seen.gram is not None
    scale = seen.gram.diagonal().sqrt()
    density = None if pattern == "2:4" else 0.3
    for rule, options, d in (
        (oats, OatsSplitter(pattern=pattern, density=density), scale),
        (godec, GodecSplitter(pattern=pattern, density=density, tolerance=0), torch.ones_like(scale)),
    ):
        ratios = []
        for seed in range(4):
            W = randn(40, 48, seed=seed)
            S = rest = torch.zeros_like(W)
            for _ in range(options.iterations):
                U, sigma, Vh = torch.linalg.svd(W * d - S, full_matrices=False)
                rest = W * d - U[:, :5] * sigma[:5] @ Vh[:5]
                S = torch.where(strongest(rest.abs(), pattern, density or 0.0), rest, 0.0)
            found = run(rule, W, 5, options, seen)
            assert float(((W - whole(found)) * d).norm()) == pytest.approx(found.history[-1])
            ratios.append(found.history[-1] / float((rest - S).norm()))
        assert sum(ratios) / 4 < 1.02, ratios


def test_rank_zero_of_oats_is_wandas_pruning() -> None:
    W, seen = randn(6, 10), moments(10)
    found = run(oats, W, 0, OatsSplitter(density=0.5), seen)
    assert seen.gram is not None
    scores = W.abs() * seen.gram.diagonal().sqrt()
    keep = torch.zeros_like(W, dtype=torch.bool).scatter_(1, scores.argsort(1, descending=True)[:, :5], True)
    assert torch.equal(found.rest != 0, keep)
    torch.testing.assert_close(found.rest, torch.where(keep, W, 0.0))


def test_density_zero_of_oats_is_the_scaled_truncated_svd() -> None:
    W, seen = randn(8, 12), moments(12)
    found = run(oats, W, 3, OatsSplitter(density=0.0, iterations=1), seen)
    assert seen.gram is not None
    d = seen.gram.diagonal().sqrt()
    U, S, Vh = torch.linalg.svd(W * d, full_matrices=False)
    torch.testing.assert_close(whole(found), U[:, :3] * S[:3] @ Vh[:3] / d)
    assert found.error == pytest.approx(float(S[3:].norm() / S.norm()))


def test_all_entries_are_the_weight_itself() -> None:
    W = randn(8, 12)
    torch.testing.assert_close(whole(run(oats, W, 3, OatsSplitter(density=1.0), moments(12))), W)
    torch.testing.assert_close(whole(run(godec, W, 0, GodecSplitter(density=1.0))), W)


def test_an_input_that_never_comes_gives_no_nan() -> None:
    gram = moments(12).gram
    assert gram is not None
    gram[3], gram[:, 3] = 0, 0
    found = run(oats, randn(8, 12), 2, OatsSplitter(density=0.3), Moments(gram=gram))
    assert bool(torch.isfinite(whole(found)).all())
    assert found.notes == ("1 of 12 inputs are always nearly zero: floor 1e-05",)
    assert run(oats, randn(8, 12), 2, OatsSplitter(density=0.3), Moments(gram=torch.zeros(12, 12))).notes != ()


def test_oats_without_inputs_is_refused() -> None:
    with pytest.raises(SolverError, match=r"moments\.gram"):
        run(oats, randn(3, 4), 1, OatsSplitter(density=0.3))


def test_slim_leaves_the_tail_of_the_scaled_error() -> None:
    W, seen = randn(8, 12), moments(12)
    found = run(slim, W, 3, SlimSplitter(pattern="2:4"), seen)
    assert seen.gram is not None
    d = seen.gram.diagonal().sqrt()
    tail = torch.linalg.svdvals((W - found.rest) * d)[3:]
    assert found.history[0] == pytest.approx(float(tail.norm()))
    assert float(((W - whole(found)) * d).norm()) == pytest.approx(float(tail.norm()))
    assert torch.equal(found.rest[found.rest != 0], W[found.rest != 0])


def test_slim_without_a_mask_has_nothing_to_add() -> None:
    W = randn(8, 12)
    found = run(slim, W, 3, SlimSplitter(density=1.0), moments(12))
    assert torch.equal(found.rest, W)
    assert float((found.B @ found.A).abs().max()) == 0


def test_sltrain_draws_the_count_of_the_card_by_its_seed() -> None:
    W = randn(40, 50)
    found, again = run(sltrain, W, 4, SltrainSplitter()), run(sltrain, W, 4, SltrainSplitter())
    assert found.support is not None
    assert int(found.support.sum()) == int(0.03 * 2000)
    assert again.support is not None
    assert torch.equal(found.support, again.support)
    assert falls(found.history)
    torch.testing.assert_close(whole(found)[found.support], W[found.support], atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", ["nf2", "nf3", "nf4", "int4"])
def test_lq_returns_its_best_turn_and_beats_plain_rounding(name: str) -> None:
    W = randn(64, 96)
    found = run(lq, W, 8, LqSplitter(format=FORMATS[name]))
    assert falls(found.history[:-1])
    assert found.error * float(W.norm()) == pytest.approx(min(found.history))
    assert float((W - whole(found)).norm()) == pytest.approx(min(found.history))
    assert found.error < plain_error(W.float(), FORMATS[name])
    assert found.encoded is not None
    assert torch.equal(FORMATS[name].decode(found.encoded, (64, 96)).double(), found.rest)


def test_constant_fisher_changes_nothing_and_fisher_of_rank_one_is_solved_exactly() -> None:
    W = randn(32, 64)
    form = FORMATS["nf3"]
    plain = run(lq, W, 4, LqSplitter(format=form))
    constant = run(
        lq, W, 4, LqSplitter(format=form, weights="fisher"), Moments(weight_fisher=torch.full((32, 64), 3.0, dtype=F64))
    )
    torch.testing.assert_close(whole(constant), whole(plain))
    r, c = torch.rand(32, 1, dtype=F64) + 0.1, torch.rand(1, 64, dtype=F64) + 0.1
    one = run(lq, W, 4, LqSplitter(format=form, weights="fisher", iterations=1), Moments(weight_fisher=r * c))
    X = (r * c).sqrt() * W
    tail = torch.linalg.svdvals(X)[4:]
    B, A = one.B, one.A
    assert float(((r * c).sqrt() * (W - B @ A)).norm()) == pytest.approx(float(tail.norm()), rel=1e-8)


def test_fisher_that_was_not_measured_is_refused() -> None:
    with pytest.raises(SolverError, match="weights: none"):
        run(lq, randn(8, 64), 2, LqSplitter(weights="fisher"))


def test_loftq_is_rounding_and_the_best_product_for_its_error() -> None:
    W = randn(48, 64)
    form = Integer(bits=4, block=32)
    found = run(loftq, W, 6, LoftqSplitter(format=form))
    Q = form.rounded(W.float()).double()
    assert torch.equal(found.rest, Q)
    tail = torch.linalg.svdvals(W - Q)[6:]
    assert found.history[0] == pytest.approx(float(tail.norm()))


def test_ties_and_odd_ends_of_patterns() -> None:
    assert strongest(torch.ones(2, 4), "2:4", 0.0).tolist() == [[True, True, False, False]] * 2
    kept = strongest(torch.arange(7.0)[None], "2:4", 0.0)
    assert kept.tolist() == [[False, False, True, True, False, False, True]]
