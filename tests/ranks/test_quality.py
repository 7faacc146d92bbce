"""Bisection on a metric: the judge is made up, so that the smallest model within the bound is known."""

from collections.abc import Callable, Mapping

import pytest
from curves import curve
from pydantic import ValidationError

from lrc.ranks import Allocation, Choice, Quality, QualityBudget, SiteCurve, Verdict, allocate_ranks
from lrc.ranks.quality import least_share

CURVES = [curve(40, 30, seed=1, name="a", bias=True), curve(20, 50, seed=2, name="b")]


def size(choices: Mapping[str, Choice]) -> float:
    """The share of all numbers, biases counted, that a model of some choices keeps."""
    kept = sum(c.dense_size if (r := choices[c.name].rank) is None else c.size(r) for c in CURVES)
    bias = sum(c.bias for c in CURVES)
    return (kept + bias) / (sum(c.dense_size for c in CURVES) + bias)


def judge(least: float, asked: list[float] | None = None) -> Callable[[Mapping[str, Choice]], Verdict]:
    """Models of at least some size are good enough."""

    def verdict(choices: Mapping[str, Choice]) -> Verdict:
        share = size(choices)
        if asked is not None:
            asked.append(share)
        return Verdict("accuracy", share, share >= least, f"accuracy {share:.3f}")

    return verdict


def found(least: float, asked: list[float] | None = None, **options: float) -> Allocation:
    budget = QualityBudget(quality=Quality(at_least=least, **options))
    return allocate_ranks(CURVES, budget, allocate="global", judge=judge(least, asked))


@pytest.mark.parametrize("least", [0.2, 0.5, 0.77, 0.93])
@pytest.mark.parametrize("resolution", [0.01, 0.05])
def test_the_smallest_model_within_the_bound_is_found(least: float, resolution: float) -> None:
    made = found(least, resolution=resolution)
    step = 60 / (40 * 30 + 20 * 50)  # ranks are whole
    assert least <= size(made.choices) <= least + resolution + step
    assert any(tried.choices == made.choices for tried in made.tried)


def test_every_step_halves_what_is_not_known() -> None:
    asked: list[float] = []
    made = found(0.6, asked)
    assert len(asked) == 8  # the dense one, and 7 halvings of what is above the smallest ranks
    assert [tried.verdict.value for tried in made.tried] == asked
    assert len(made.notes) == 1
    assert found(0.6).choices == made.choices


def test_the_smallest_ranks_are_tried_where_everything_meets_the_bound() -> None:
    made = found(0.0)
    assert {choice.rank for choice in made.choices.values()} == {1}
    assert made.tried[-1].amount == least_share(CURVES, 1)


def test_everything_stays_dense_where_nothing_meets_the_bound() -> None:
    for least, reason in ((1.0, "no smaller model was found to meet the bound of quality"), (1.1, "the model itself misses")):
        made = found(least)
        assert {choice.rank for choice in made.choices.values()} == {None}
        assert all(reason in choice.reason for choice in made.choices.values())
        assert made.notes[0].startswith(f"quality: everything stays dense: {reason}")
    assert len(made.tried) == 1


def test_sites_that_no_rank_shrinks_stay_dense() -> None:
    row: list[SiteCurve] = [curve(1, 1, name="one")]
    verdict = Verdict("accuracy", 1.0, True, "accuracy 1")
    made = allocate_ranks(row, QualityBudget(quality=Quality(at_least=0)), allocate="global", judge=lambda _: verdict)
    assert made.choices["one"].rank is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of max_degradation, at_least, at_most, got none"),
        ({"at_least": 0.5, "at_most": 0.9}, "got at_least and at_most"),
        ({"metric": "kl", "max_degradation": 0.1}, "`kl` compares with the original model by itself"),
        ({"metric": "perplexty", "at_most": 9.0}, "Did you mean 'perplexity'"),
        ({"max_degradation": -0.1}, "greater than or equal to 0"),
        ({"max_degradations": 0.1}, "did you mean `max_degradation`"),
    ],
)
def test_a_bound_is_one_and_says_what_is_wrong(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quality.model_validate(given)
