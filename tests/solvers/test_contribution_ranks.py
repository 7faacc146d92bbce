"""Ranks by contribution: proportional, within the budget, and refused where they cannot be."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrc.errors import UsageError
from lrc.ranks import ContributionRank, SiteCurve, allocate_ranks

NOTHING = torch.empty(0)


def curves(*shapes: tuple[int, int]) -> list[SiteCurve]:
    return [SiteCurve(f"s{i}", *shape, losses=NOTHING, S=NOTHING, form="two_factor") for i, shape in enumerate(shapes)]


def ranks(shapes: list[tuple[int, int]], scores: list[float], **options: float) -> list[int]:
    named = {f"s{i}": score for i, score in enumerate(scores)}
    policy = ContributionRank.model_validate({"contribution": {"scores": named, **options}})
    choices = allocate_ranks(curves(*shapes), policy, allocate="uniform").choices
    return [choices[f"s{i}"].rank or 0 for i in range(len(shapes))]


def spent(shapes: list[tuple[int, int]], found: list[int]) -> int:
    return sum(rank * sum(shape) for shape, rank in zip(shapes, found, strict=True))


cases = st.lists(
    st.tuples(st.tuples(st.integers(8, 90), st.integers(8, 90)), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(cases=cases, budget=st.sampled_from([0.02, 0.1, 0.3]))
def test_ranks_fit_the_budget_and_leave_less_than_one_rank_of_it(
    cases: list[tuple[tuple[int, int], float]], budget: float
) -> None:
    shapes, scores = [shape for shape, _ in cases], [score for _, score in cases]
    found = ranks(shapes, scores, budget=budget)
    amount = budget * sum(m * n for m, n in shapes)
    assert spent(shapes, found) <= amount + 1e-6
    clipped = any(rank * (m + n) >= 0.5 * m * n - (m + n) / 2 for rank, (m, n) in zip(found, shapes, strict=True))
    if not clipped and all(score > 0 for score in scores):
        assert amount - spent(shapes, found) < max(m + n for m, n in shapes)
    for rank, (m, n) in zip(found, shapes, strict=True):
        assert rank * (m + n) <= 0.5 * m * n + (m + n) / 2


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=6))
def test_who_contributes_more_gets_no_less(scores: list[float]) -> None:
    found = ranks([(60, 40)] * len(scores), scores, budget=0.1)
    for i, j in itertools.permutations(range(len(scores)), 2):
        assert scores[i] <= scores[j] or found[i] >= found[j]


def test_equal_scores_give_equal_shares_and_not_equal_ranks() -> None:
    shapes = [(96, 96), (48, 192), (192, 192)]
    found = ranks(shapes, [0.3, 0.3, 0.3], budget=0.25)
    shares = [rank * (m + n) / (m * n) for rank, (m, n) in zip(found, shapes, strict=True)]
    assert max(shares) - min(shares) <= 2 * max((m + n) / (m * n) for m, n in shapes)
    assert len(set(found)) > 1


def test_a_scale_of_all_scores_changes_nothing_and_zero_scores_give_no_adapter() -> None:
    shapes = [(30, 50), (60, 20), (64, 64)]
    assert ranks(shapes, [0.1, 0.2, 0.4], budget=0.2) == ranks(shapes, [1e-7, 2e-7, 4e-7], budget=0.2)
    assert ranks(shapes, [0.0, 0.0, 0.0], budget=0.2) == [0, 0, 0]
    assert ranks(shapes, [0.1, 0.2, 0.4], budget=0) == [0, 0, 0]
    assert ranks(shapes, [0.0, 0.0, 0.0], budget=0.3, least=0.2) == [round(0.2 * m * n / (m + n)) for m, n in shapes]


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no score for s1"):
        ranks([(8, 8), (8, 8)], [1.0], budget=0.1)
    with pytest.raises(UsageError, match="which what is trained beside, `least` and `beta` need"):
        ranks([(80, 80)], [1.0], budget=0.1, least=0.4)
    with pytest.raises(ValidationError, match="a contribution is not negative"):
        ranks([(8, 8)], [-1.0], budget=0.1)
    with pytest.raises(ValidationError, match="is no JSON file of names and scores"):
        ContributionRank.model_validate({"contribution": {"scores": str(tmp_path / "absent.json"), "budget": 0.1}})
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"s0": 0.5}))
    made = ContributionRank.model_validate({"contribution": {"scores": str(file), "budget": 0.1}})
    assert made.contribution.scores == {"s0": 0.5}


def test_beta_is_the_share_of_a_layer_that_contributes_nothing() -> None:
    shapes = [(60, 40)] * 3
    size, one = 2400, 100
    assert ranks(shapes, [0.0, 0.0, 0.0], budget=0.5, beta=0.25) == [round(0.25 * size / one)] * 3
    found = ranks(shapes, [1.0, 0.5, 0.0], budget=0.3, beta=0.125)
    assert found[2] == 3
    assert found[0] - 3 == pytest.approx(2 * (found[1] - 3), abs=2)
    assert 0.3 * 3 * size - one < spent(shapes, found) <= 0.3 * 3 * size
    assert ranks(shapes, [1.0, 0.5, 0.1], budget=0.5, beta=-0.1, most=0.4)[2] < ranks(shapes, [1.0, 0.5, 0.1], budget=0.5)[2]
    with pytest.raises(UsageError, match=r"at least 0\.25, which what is trained beside, `least` and `beta` need"):
        ranks(shapes, [1.0, 0.5, 0.0], budget=0.1, beta=0.25)


def test_the_budget_covers_what_is_trained_beside_the_products() -> None:
    shapes = [(60, 40)] * 3
    plain, beside = (ranks(shapes, [1.0, 0.5, 0.2], budget=0.1, beside=numbers) for numbers in (0, 300))
    assert spent(shapes, plain) == 700
    assert spent(shapes, beside) == 400
    assert ranks(shapes, [1.0, 0.5, 0.2], budget=0.1, beside=720) == [0, 0, 0]
    with pytest.raises(UsageError, match=r"at least 0\.1001"):
        ranks(shapes, [1.0, 0.5, 0.2], budget=0.1, beside=721)
