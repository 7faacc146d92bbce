"""How several processes share a `train`: what they cannot do together is refused before anything runs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrc.errors import UsageError
from lrc.train.blocks import InBlocks
from lrc.train.distributed import Alone, Replicated, Sharded, world
from lrc_passes.train_run import Runs

DDP = "Set `distributed: ddp`"


def check_shares(options: Any, where: str) -> None:
    """Raise UsageError for what several processes cannot do together."""
    size = world().size
    sharded = options.distributed == "fsdp2" and size > 1
    if options.batch_size % size:
        raise UsageError(
            where, expected=f"a `batch_size` that {size} processes share evenly", got=str(options.batch_size),
            hint="It counts the samples of all processes together",
        )  # fmt: skip
    if size > 1 and options.per_layer:
        raise UsageError(where, message="`per_layer` updates before gradients are averaged", hint="Set `per_layer: false`")
    if sharded and options.recipe is not None:
        raise UsageError(where, message=f"the recipe `{options.recipe.type}` wants whole parameters", hint=DDP)
    if sharded and not options.optimizer.sharded:
        raise UsageError(where, message=f"`{options.optimizer.type}` wants whole gradients, not shares of them", hint=DDP)


def parallel_of(options: Any, runs: Runs, parameters: Mapping[str, Tensor]) -> Alone:
    """Return how the processes share the work; one process alone does it all."""
    if world().size == 1:
        return Alone(runs.loss, parameters)
    if options.distributed == "fsdp2":
        student = runs.student
        assert isinstance(student, InBlocks), "made so for several processes"
        return Sharded(parameters, student)
    return Replicated(runs.loss, parameters, runs.student)
