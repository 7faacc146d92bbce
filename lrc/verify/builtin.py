"""The metrics that come with lrc. A third-party one enters by the same door, the entry points `lrc.metrics`."""

from typing import Any

from lrc.spec.registry import Rule
from lrc.verify.metrics.accuracy import accuracy
from lrc.verify.metrics.generation import divergence, generation
from lrc.verify.metrics.perplexity import perplexity
from lrc.verify.metrics.python import python_metric
from lrc.verify.metrics.spearman import spearman

BUILTIN: tuple[Rule[Any, Any], ...] = (spearman, perplexity, accuracy, generation, divergence, python_metric)
