"""Other budgets for a pass, planned from the same decompositions: what each would cost and lose."""

from collections.abc import Callable
from dataclasses import replace

from pydantic import ValidationError

from lrc.errors import UsageError
from lrc.program import Program
from lrc.ranks import Allocation, ParamsKept, QualityBudget, RankPolicy
from lrc.run.plan import Decision, Point
from lrc.run.points import Draw
from lrc.run.quality import Choices, trials_of
from lrc.run.session import Session
from lrc.spec.registry import tag_of


def check_sweep(program: Program, session: Session, budget: RankPolicy) -> None:
    """Raise UsageError for a sweep that cannot be made, before anything is measured."""
    if session.pareto is None or not budget.budget:
        return
    kind = kind_of(budget)
    for amount in session.pareto.budgets:
        policy_of(kind, tag_of(kind), amount)
    if session.pareto.metric is not None:
        trials_of(program, session, session.pareto.metric, "pareto").check()


def kind_of(budget: RankPolicy) -> type[RankPolicy]:
    """Return the budget whose amounts vary: the pass's own, or parameters where that is one of quality."""
    return ParamsKept if isinstance(budget, QualityBudget) else type(budget)


def swept(
    program: Program,
    session: Session,
    budget: RankPolicy,
    name: str,
    allocated: Callable[[RankPolicy], Allocation],
    decided: Callable[[Choices], list[Decision]],
    made: Callable[[Choices], Program],
    draw: Draw,
) -> list[Point]:
    """Return a point for every budget of the spec's `pareto`, and for the pass's own, `budget`, the largest amount first.

    name: of the pass. An amount that not even the smallest ranks meet is a point with the reason. A pass without a budget has
    none, with a note. Raises UsageError for a number that is no amount of the pass's budget.
    """
    if session.pareto is None:
        return []
    if not budget.budget:
        session.notices.append(f"pareto: the ranks of `{name}` come from no budget, so there is none to vary")
        return []
    kind = kind_of(budget)
    key = tag_of(kind)
    own = getattr(budget, key, None)
    metric = session.pareto.metric
    trials = None if metric is None else trials_of(program, session, metric, "pareto")
    amounts = sorted({*session.pareto.budgets, *([] if own is None else [own])}, reverse=True)
    policies = [policy_of(kind, key, amount) for amount in amounts]
    points = []
    for amount, policy in session.track("pareto", list(zip(amounts, policies, strict=True))):
        try:
            choices = allocated(policy).choices
        except UsageError as error:
            points.append(draw((), key, amount, refused=str(error)))
            continue
        point = replace(draw(decided(choices), key, amount), chosen=amount == own)
        if trials is not None:
            score = trials.score(made(choices))
            point = replace(point, metric=score.metric, value=score.value)
        points.append(point)
    return points


def policy_of(kind: type[RankPolicy], key: str, amount: float) -> RankPolicy:
    """Return a budget of some amount. Raises UsageError for a number that it does not take."""
    try:
        return kind.model_validate({key: amount})
    except ValidationError as error:
        what = error.errors()[0]["msg"].lower()
        raise UsageError("pareto.budgets", message=f"{key}: {what}, got {amount:g}") from error
