"""Measuring a metric on programs that are only tried: each one once, found again by its content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrc.data import Request
from lrc.data.load import is_factory
from lrc.errors import UsageError
from lrc.measure import Cache, digest
from lrc.program import Program
from lrc.run.output import sha256
from lrc.spec.document import EvaluateSpec, GatesSpec
from lrc.spec.registry import METRICS
from lrc.verify.evaluate import Score, evaluate, judge, metric_name
from lrc.verify.metrics.base import MetricOptions, Subject

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class Evaluation:
    """How a spec judges: its section `evaluate`, and how its data is read."""

    spec: EvaluateSpec
    request: Request

    def metric(self, asked: Any, where: str) -> MetricOptions:
        """Return the metric that is asked for, or the only one of the spec. Raises UsageError where there is no such one."""
        if asked is not None:
            assert isinstance(asked, MetricOptions)
            return asked
        if len(self.spec.metrics) != 1:
            names = ", ".join(metric_name(m) for m in self.spec.metrics if isinstance(m, MetricOptions)) or "none"
            raise UsageError(
                f"{where}.metric", message=f"it is not said which metric; `evaluate.metrics` has {names}", hint="Name one"
            )
        (found,) = self.spec.metrics
        assert isinstance(found, MetricOptions)
        return found


class Trials:
    """The scores of programs beside an original one.

    Values are kept on disk where the data is a file and the metric is ours: a killed run takes them over. Metrics from
    Python and data from factories may change without a trace, and are measured again.
    """

    def __init__(self, cache: Cache, evaluation: Evaluation, options: MetricOptions, original: Program) -> None:
        self.cache = cache
        self.evaluation = evaluation
        self.options = options
        self.original = original
        self.name = metric_name(options)
        self._seen: dict[str, float] = {}
        self._data = self._digest_of_data() if _ours(options) else None
        self._key_of_original = self._key(original)

    def check(self) -> None:
        """Raise UsageError where the metric has no data."""
        Subject(self.original, self.evaluation.request).data(self.options)

    def score(self, program: Program) -> Score:
        """Return the metric of a program, beside that of the original. Raises UsageError where there is no data."""
        before = None if self.options.relative else self._value(self.original, self._key_of_original)
        value, gain = self._value(program, self._key(program)), None
        if before:
            gain = (value - before) / abs(before) * (1 if self.options.higher_is_better else -1)
        return Score(self.name, value, before, gain)

    def _value(self, program: Program, key: str) -> float:
        if key in self._seen:
            return self._seen[key]
        stored = self.cache.get(key) if self._data is not None else None
        if stored is None:
            spec = self.evaluation.spec.model_copy(update={"metrics": [self.options]})
            original = self.original if self.options.relative else None
            (score,) = evaluate(program, original, spec, self.evaluation.request)
            stored = {"value": torch.tensor([score.value], dtype=torch.float64)}
            if self._data is not None:
                self.cache.put(key, stored)
        self._seen[key] = float(stored["value"])
        return self._seen[key]

    def _key(self, program: Program) -> str:
        against = self._key_of_original if self.options.relative and program is not self.original else ""
        machine = (torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
        made = digest("score-1", program.digest(), against, self.options, self._data, *machine)
        return f"{made}-score"

    def _digest_of_data(self) -> str | None:
        """Return the hash of what a metric reads, or None where no hash tells it."""
        request = self.evaluation.request
        if self.options.dataset is not None:
            request = replace(request, dataset=self.options.dataset)
        if not request.dataset or is_factory(request.dataset) or not request.path.is_file():
            return None
        folder = request.tokenizer or Path()
        tokenizer = [sha256(folder / name) for name in TOKENIZER if (folder / name).is_file()] if request.tokenizer else []
        asked = replace(request, base=Path(), tokenizer=None, dataset=request.path.suffix)
        return digest(sha256(request.path), tokenizer, asked)


def _ours(options: MetricOptions) -> bool:
    """Say whether a metric is one of lrc and runs no other code."""
    function = METRICS.for_options(options).function
    return function.__module__.partition(".")[0] == "lrc" and options.type != "python"


def bound_of(options: Any, name: str) -> GatesSpec:
    """Return the one bound of a budget of quality as gates on the metric called `name`."""
    if options.max_degradation is not None:
        return GatesSpec(max_degradation=options.max_degradation)
    bounds: dict[str, Mapping[str, float]] = {
        key: {name: value} for key in ("at_least", "at_most") if (value := getattr(options, key)) is not None
    }
    return GatesSpec.model_validate(bounds)


def within(score: Score, gates: GatesSpec) -> bool:
    """Say whether a score passes gates. Raises UsageError where its degradation is not known."""
    if gates.max_degradation is not None and score.gain is None:
        raise UsageError(
            "rank.quality.max_degradation",
            message=f"{score.metric} of the original model is {score.original}, so no loss is relative to it",
            hint="Give at_least or at_most",
        )
    return all(gate.ok for gate in judge([score], gates))


def in_words(scores: Sequence[Score]) -> str:
    """Return scores as text: `perplexity 31.2 (+2.1 %)`; better or worse, as it is, against the original."""
    texts = []
    for score in scores:
        change = f" ({(score.value - score.original) / abs(score.original):+.2%})" if score.original else ""
        texts.append(f"{score.metric} {score.value:.5g}{change}")
    return ", ".join(texts)
