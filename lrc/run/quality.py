"""A budget of quality on a program: every step's model is made from the stored decompositions and measured."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lrc.errors import UsageError
from lrc.program import Program
from lrc.ranks import Allocation, Choice, Judge, Quality, QualityBudget, Verdict
from lrc.run.plan import Decision, Point
from lrc.run.points import Draw
from lrc.run.session import Session
from lrc.run.trials import Trials, bound_of, in_words, within

Choices = Mapping[str, Choice]


def trials_for(program: Program, session: Session, options: Any, index: int) -> Trials | None:
    """Return what measures the models of a budget of quality, or None for another budget.

    The original is measured now: a missing file or tokenizer shows before hours of decomposition. Raises UsageError where
    the spec does not say which metric, or names no data.
    """
    if not isinstance(options.rank, QualityBudget):
        return None
    trials = trials_of(program, session, options.rank.quality.metric, f"{session.where(index)}.rank.quality")
    within(trials.score(trials.original), bound_of(options.rank.quality, trials.name))
    return trials


def trials_of(program: Program, session: Session, metric: Any, where: str) -> Trials:
    """Return what measures a metric beside the model as it was before the first pass. Raises UsageError with its place."""
    if session.evaluation is None:
        raise UsageError(where, message="there is nothing to evaluate on", hint="Add `evaluate: {dataset: FILE}`")
    chosen = session.evaluation.metric(metric, where)
    return Trials(session.cache, session.evaluation, chosen, session.original or program.clone())


def judge_of(options: Quality, trials: Trials, session: Session, made: Callable[[Choices], Program]) -> Judge:
    """Return what measures the model of some choices; the same choices are made and measured once."""
    gates = bound_of(options, trials.name)
    seen: dict[tuple[tuple[str, int | None, str], ...], Verdict] = {}

    def judge(choices: Choices) -> Verdict:
        key = tuple((name, choice.rank, str(choice.form)) for name, choice in sorted(choices.items()))
        if key not in seen:
            session.progress("quality", len(seen), len(seen) + 1)
            score = trials.score(made(choices))
            seen[key] = Verdict(score.metric, score.value, within(score, gates), in_words([score]))
        return seen[key]

    return judge


def points_of(found: Allocation, decided: Callable[[Choices], list[Decision]], draw: Draw) -> list[Point]:
    """Return what is to tell of the budgets that were tried, largest first."""
    points: list[Point] = []
    for step in sorted(found.tried, key=lambda step: -step.amount):
        point = draw(decided(step.choices), step.budget, step.amount)
        chosen = same(step.choices, found.choices) and not any(p.chosen for p in points)
        note = "" if step.verdict.ok else "misses the bound"
        verdict = step.verdict
        points.append(replace(point, metric=verdict.metric, value=verdict.value, chosen=chosen, note=note))
    return points


def same(a: Choices, b: Choices) -> bool:
    """Say whether two choices make the same model."""
    return all((a[name].rank, a[name].form) == (b[name].rank, b[name].form) for name in a)
