"""A loss of the user's own."""

import importlib
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from lrc.errors import UsageError
from lrc.train.data import Reads
from lrc.train.objectives.base import ObjectiveOptions, Step, objective


class PythonObjective(ObjectiveOptions):
    """A function of yours: `(outputs, batch) -> loss`, a tensor of one number."""

    type: Literal["python"] = "python"
    function: str = Field(description="package.module:function (needs --allow-code).")
    reads: ClassVar[Reads] = "lines"


@objective(PythonObjective)
def python(step: Step, options: PythonObjective) -> Tensor:
    """Return what the function returns for the outputs and the batch, both mappings of tensors by name."""
    if not step.allow_code:
        raise UsageError(options.function, message="an objective runs code of yours", hint="Add `--allow-code` to let it run")
    loss = find(options.function)(step.student(step.batch), step.batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(options.function, expected="a loss: a tensor of one number", got=repr(loss)[:60])
    return loss.reshape(())


def find(path: str) -> Any:
    """Return what `package.module:name` names. Raises UsageError when there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(path, message=str(error), hint="Is its folder on PYTHONPATH?") from error
