"""What a step of `train` takes: predicted by a step over tensors that have no memory, and measured on a real one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrc.data import Batch
from lrc.measure.cotangents import has_classes
from lrc.train.distributed import world
from lrc.train.loop import Loop, autocast
from lrc.train.memory import held, predicted
from lrc.train.objectives.base import Outputs
from lrc.train.optim import PerLayer
from lrc_passes.train_run import Runs, examples_of

WORK = 3  # copies of the largest parameter that an optimizer works with


def predict(runs: Runs, names: Sequence[str], index: int) -> None:
    """Predict the peak of a step and say so in the plan; what cannot be predicted is said too.

    The weights of this and of the uncompressed program, each storage once, and copies of those that are trained and shared; the
    optimizer's state; and the most that lives at once in a forward and backward pass of the largest batch of an epoch.
    """
    session, options, program = runs.session, runs.options, runs.program
    if world().size > 1:
        session.notices.append("train: the memory of a step is predicted for one process alone")
        return
    examples = examples_of(program, session, options, options.data)
    batches = examples.epoch(options.batch_size, options.seed, 0)
    if not batches:
        return  # an error of the loop
    tensors = program.tensors()
    trained = {name: tensors[name] for name in names}
    weights, gradients = static(runs), sum(t.nbytes for t in trained.values())
    before = {} if session.original is None else session.original.tensors()
    shared = {t.untyped_storage().data_ptr() for t in before.values()}
    weights += sum(t.nbytes for t in trained.values() if t.untyped_storage().data_ptr() in shared)
    weights += gradients * (options.validation is not None)  # the best ones so far
    moved = trained if options.recipe is None else options.recipe.moved(trained, options.seed)
    weights += 0 if options.recipe is None else options.recipe.held_bytes(trained)
    state = sum(options.optimizer.state_bytes(t.shape, t.element_size()) for t in moved.values())
    batch = examples.batch(max(batches, key=examples.numbers))
    try:
        runs.student.train()
        step = predicted(
            runs.student, trained.values(), lambda student: stand_in(runs, student, batch, trained), freed=options.per_layer
        )
    except Exception as error:  # operators of others may have no shapes without values
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        session.notices.append(f"train: the memory of a step cannot be predicted: {first}")
        return
    finally:
        runs.student.eval()
    largest = max(t.nbytes for t in trained.values())
    step += 0 if options.recipe is None else options.recipe.step_bytes(trained)
    step = max(step, WORK * largest + (largest if options.per_layer else gradients))
    session.step_memory[index] = weights + state + step
    parts = f"weights {mib(weights)}, optimizer {mib(state)}, gradients and activations {mib(step)}"
    session.notices.append(f"train: a step takes about {mib(weights + state + step)} at its peak: {parts}")


def static(runs: Runs) -> int:
    """Return the bytes of the weights of this and of the uncompressed program, each storage once."""
    original = runs.session.original
    return held([*runs.program.tensors().values(), *(() if original is None else original.tensors().values())])


def stand_in(runs: Runs, student: nn.Module, batch: Batch, trained: dict[str, Tensor]) -> Tensor:
    """Return a loss that keeps about what the objective keeps, without reading a value."""
    inputs = runs.program.inputs.fill(batch)
    with torch.no_grad():
        wanted = None if runs.teacher is None else logs(runs.teacher(**inputs), runs.program.task)
    with autocast(trained, runs.options.precision == "bfloat16"):
        found = logs(student(**inputs), runs.program.task)
        if wanted is None:
            return torch.stack([value.square().mean() for value in found]).sum()
        return torch.stack([(a - b).square().mean() for a, b in zip(found, wanted, strict=True)]).sum()


def logs(outputs: Outputs, task: str | None) -> list[Tensor]:
    """Return what a loss is taken of: log-probabilities of classes, or all floating outputs."""
    if has_classes(task) and "logits" in outputs:
        rows = outputs["logits"].flatten(0, -2)
        return [rows.float().log_softmax(-1)]
    return [value.float() for value in outputs.values() if value.is_floating_point()]


def measured(runs: Runs, loop: Loop, index: int) -> dict[str, int | None]:
    """Return the predicted and the measured peak of a step; None where there is none (a run that was finished before)."""
    found = None
    if loop.grown is not None:
        inner = loop.optimizer.optimizers if isinstance(loop.optimizer, PerLayer) else [loop.optimizer]
        state = [v for one in inner for slots in one.state.values() for v in slots.values() if isinstance(v, Tensor)]
        best = () if loop.best is None else loop.best["parameters"].values()
        found = static(runs) + held([*state, *best]) + loop.grown
    return {"predicted": runs.session.step_memory.get(index), "measured": found}


def mib(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**20:.1f} MiB"
