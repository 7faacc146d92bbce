"""Quality of a model beside that of the original, and the gates that it must pass."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrc.data import Request
from lrc.errors import GateError
from lrc.lower.base import Runner
from lrc.spec.document import EvaluateSpec, GatesSpec
from lrc.spec.registry import METRICS
from lrc.verify.metrics.base import MetricOptions, Subject


@dataclass(frozen=True)
class Score:
    """One metric: its value, that of the original model, and the relative gain (negative: a loss)."""

    metric: str
    value: float
    original: float | None
    gain: float | None

    def row(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """One condition and whether it holds."""

    gate: str
    expected: str
    found: str
    ok: bool

    def row(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def evaluate(
    runner: Runner,
    original: Runner | None,
    spec: EvaluateSpec,
    request: Request,
    known: Mapping[str, float] | None = None,
) -> list[Score]:
    """Return the score of every metric of the spec. known: values of the original that need no measuring again."""
    scores = []
    for options in spec.metrics:
        assert isinstance(options, MetricOptions)
        rule = METRICS.for_options(options)
        value = float(rule(Subject(runner, request, original), options))
        name = metric_name(options)
        before: float | None = None
        if not options.relative and known is not None and name in known:
            before = known[name]
        elif not options.relative and original is not None:
            before = float(rule(Subject(original, request), options))
        gain = None
        if before is not None and before != 0:
            gain = (value - before) / abs(before) * (1 if options.higher_is_better else -1)
        scores.append(Score(name, value, before, gain))
    return scores


def metric_name(options: MetricOptions) -> str:
    """Return what a metric is called in the report and in gates."""
    return str(getattr(options, "name", None) or options.type)


def judge(scores: Sequence[Score], gates: GatesSpec) -> list[Gate]:
    """Return every gate of the spec with what was found."""
    found = []
    for score in scores:
        if gates.max_degradation is not None and score.gain is not None:
            ok = -score.gain <= gates.max_degradation
            found.append(Gate(f"max_degradation of {score.metric}", f"<= {gates.max_degradation:g}", f"{-score.gain:.4g}", ok))
        if gates.min_improvement is not None and score.gain is not None:
            ok = score.gain >= gates.min_improvement
            found.append(Gate(f"min_improvement of {score.metric}", f">= {gates.min_improvement:g}", f"{score.gain:.4g}", ok))
    values = {score.metric: score.value for score in scores}
    for name, bound in gates.at_least.items():
        value = values.get(name)
        found.append(Gate(f"at_least {name}", f">= {bound:g}", _text(value), value is not None and value >= bound))
    for name, bound in gates.at_most.items():
        value = values.get(name)
        found.append(Gate(f"at_most {name}", f"<= {bound:g}", _text(value), value is not None and value <= bound))
    return found


def _text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def raise_on_missed(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise GateError that names every gate (or parity check) of `rows` that is not `ok`."""
    missed = [row for row in rows if not row["ok"]]
    if not missed:
        return
    texts = [
        f"{row['gate']} expected {row['expected']}, got {row['found']}"
        if "gate" in row
        else f"{row['format']} at {row['shape']}: {row['output']} differs by {row['largest']:.3g}, allowed {row['allowed']:.3g}"
        for row in missed
    ]
    raise GateError(where, message="; ".join(texts), hint="The result was written; the report has every figure")
