"""A metric of the user's own."""

import importlib
from typing import Literal

from pydantic import Field

from lrc.errors import UsageError
from lrc.verify.metrics.base import MetricOptions, Subject, metric


class PythonMetric(MetricOptions):
    """What a function of yours returns for the model; needs --allow-code."""

    type: Literal["python"] = "python"
    function: str = Field(description="`package.module:function`; it takes a callable (named inputs to named outputs).")
    name: str | None = Field(default=None, description="What the report calls it; the function's name without it.")


@metric(PythonMetric)
def python_metric(subject: Subject, options: PythonMetric) -> float:
    """Return `float(function(runner))`. Raises UsageError unless code may run and the function is found."""
    if not subject.request.allow_code:
        raise UsageError(options.function, message="the metric runs code of yours", hint="Add `--allow-code` to let it run")
    module, _, name = options.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(options.function, message=str(error), hint="Is its folder on PYTHONPATH?") from error
    return float(function(subject.runner))
