"""One `train`: its data, and the stretches of its steps between which other passes may run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrc.errors import UsageError
from lrc.measure import digest
from lrc.program import Program
from lrc.program.modes import running_statistics
from lrc.program.ownership import own
from lrc.run import Session
from lrc.run.output import sha256
from lrc.spec.registry import OPTIMIZERS, RECIPES
from lrc.train.checkpoint import Checkpoints
from lrc.train.data import Examples
from lrc.train.distributed import Sharded, world
from lrc.train.loop import Loop, Row
from lrc.train.optim import PerLayer, Trained
from lrc.train.recipes import Context, Own, Recipe
from lrc.train.select import as_trained
from lrc.train.settings import Part, Settings
from lrc_passes.train_memory import measured
from lrc_passes.train_run import Judge, Runs, examples_of
from lrc_passes.train_share import parallel_of


@dataclass
class Training:
    """A run over the program.

    key: the content hash of what has been run; states: those of the optimizer, by name, with the shape that each is of.
    """

    program: Program
    session: Session
    options: Any
    index: int
    examples: Examples
    settings: Settings
    key: str = ""
    states: dict[str, tuple[torch.Size, Any]] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, session: Session, options: Any, index: int) -> "Training":
        """Read the data and settle how the run goes; epochs become steps."""
        examples = examples_of(program, session, options, options.data)
        batches = len(examples.epoch(options.batch_size, options.seed, 0))
        settings = Settings(
            steps=options.steps or max(1, math.ceil((options.epochs or 1) * batches / options.accumulate)),
            batch_size=options.batch_size, accumulate=options.accumulate, clip=options.clip, schedule=options.schedule,
            bfloat16=options.precision == "bfloat16", seed=options.seed, checkpoint_every=options.checkpoint_every,
        )  # fmt: skip
        return cls(program, session, options, index, examples, settings)

    def run(self, part: Part, fqns: Sequence[str], names: Sequence[str]) -> None:
        """Train the steps of a part, taking over the checkpoints of a killed run of the same content.

        fqns: the sites with trained numbers; names: the trained parameters.
        """
        program, session, options = self.program, self.session, self.options
        before = (self.key, part.first, part.end) if options.during else ()
        self.key = run_key(program, session, options, self.examples, names, *before)
        statistics = running_statistics(program) if options.batch_norm == "update" else frozenset()
        parameters: dict[str, Tensor] = {**own(program, names, statistics)}
        program.settle()
        runs = Runs.of(program, session, options, fqns)
        if part.first == 0:
            session.notices += [f"train: {note}" for note in runs.notes]
        settings = replace(self.settings, part=part)
        parallel = parallel_of(options, runs, parameters)
        if isinstance(parallel, Sharded):
            runs, parameters = replace(runs, student=parallel.student), parallel.parameters
            parallel.losses = runs.loss
        moved = parameters if options.recipe is None else options.recipe.moved(parameters, options.seed + part.first)
        optimizer = optimizer_of(options, as_trained(moved, runs.gates, options.lr_factors))
        self.give(optimizer, parameters)
        read = partial(examples_of, program, session, options)
        basis = Own(runs.student, runs.loss, self.examples, options.batch_size, read)
        recipe = recipe_of(options, runs, parameters, moved, optimizer, settings, basis)
        loop = Loop(
            module=runs.student, parameters={**parameters, **recipe.tensors()},
            buffers={n: program.tensors()[n] for n in sorted(statistics)}, examples=self.examples, losses=runs.loss,
            optimizer=optimizer, settings=settings, checkpoints=Checkpoints(session.cache.folder / "train" / self.key[:32]),
            validation=validation_of(program, session, options, runs), in_backward=options.per_layer, recipe=recipe,
            parallel=parallel, history=list(self.history),
            report=lambda done, total: session.progress("train", done, total),
        )  # fmt: skip
        self.history = loop.run()
        self.take(optimizer, parameters)
        session.notices += [f"train: {note}" for note in (recipe.finish() if part.final else recipe.pause())]
        found = record(options, names, parameters, self.history, loop) | {"memory": measured(runs, loop, self.index)}
        self.record = found if part.first == 0 else found | {"memory": self.record["memory"]}
        if part.final:
            session.training.append(self.record)
            session.notices.append(f"train: {told(loop, self.history)}")

    def take(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Remember the optimizer's states; what a recipe moves in place of parameters is made anew for every part."""
        kept = {p: state for one in parts_of(optimizer) for p, state in one.state.items()}
        self.states = {name: (p.shape, kept[p]) for name, p in parameters.items() if p in kept}

    def give(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Let an optimizer go on with the remembered states; that of a parameter whose shape has changed begins anew."""
        owners = {id(p): one for one in parts_of(optimizer) for group in one.param_groups for p in group["params"]}
        for name, p in parameters.items():
            shape, state = self.states.get(name, (None, None))
            if shape == p.shape:
                owners[id(p)].state[p] = state


def parts_of(optimizer: Optimizer) -> Sequence[Optimizer]:
    """Return the optimizer, or those that one for every layer is made of."""
    return optimizer.optimizers if isinstance(optimizer, PerLayer) else [optimizer]


def optimizer_of(options: Any, trained: Trained) -> Optimizer:
    """Return the optimizer, or one for every parameter. Raises UsageError for one that looks at several at once."""
    make = OPTIMIZERS.for_options(options.optimizer)
    if not options.per_layer:
        made: Optimizer = make(trained, options.optimizer)
        return made
    if not options.optimizer.per_layer:
        raise UsageError(
            "train", message=f"`{options.optimizer.type}` looks at pairs of parameters", hint="Set `per_layer: false`"
        )
    return PerLayer.of(trained, lambda part: make(part, options.optimizer))


def recipe_of(
    options: Any,
    runs: Runs,
    parameters: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    optimizer: Optimizer,
    settings: Settings,
    own: Own,
) -> Recipe:
    """Return the recipe, or one that does nothing."""
    if options.recipe is None:
        return Recipe()
    batches = len(own.examples.epoch(options.batch_size, options.seed, 0))
    steps = max(1, batches // options.accumulate)
    about = Context(runs.program, runs.fqns, parameters, runs.gates, optimizer, settings.steps, steps, options.seed, own, moved)
    made: Recipe = RECIPES.for_options(options.recipe)(about, options.recipe)
    if options.per_layer and type(made).graded is not Recipe.graded:
        raise UsageError(
            "train", message=f"the recipe `{options.recipe.type}` looks at the gradients of a step, which `per_layer` frees",
            hint="Set `per_layer: false`",
        )  # fmt: skip
    return made


def run_key(program: Program, session: Session, options: Any, examples: Examples, names: Sequence[str], *before: Any) -> str:
    """Return the content hash of everything that the trained values depend on. before: of the stretches before this one."""
    files = [session.base / dataset for dataset in options.datasets().values()]
    teacher = session.original.digest() if session.original is not None and options.objective.teacher else ""
    told = options.model_dump(mode="json", exclude={"checkpoint_every"})
    return digest(
        "train-1", program.digest(), teacher, told, list(examples.items), list(names),
        [sha256(file) for file in files if file.is_file()],
        torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
        *([world().size] if world().size > 1 else []), *before,
    )  # fmt: skip


def validation_of(program: Program, session: Session, options: Any, runs: Runs) -> Any:
    """Return how the run is judged, or None."""
    spec = options.validation
    if spec is None:
        return None
    if spec.data is None:
        return Judge.by_metric(program, session, spec)
    examples = examples_of(program, session, options, spec.data)
    return Judge.by_loss(runs, examples, options.batch_size, spec)


def record(
    options: Any, names: Sequence[str], parameters: Any, history: Sequence[dict[str, float]], loop: Loop
) -> dict[str, Any]:
    """Return what the manifest and the report hold of a run."""
    return {
        "objective": options.objective.type, "optimizer": options.optimizer.type, "steps": len(history),
        "parameters": sum(p.numel() for p in parameters.values()), "tensors": len(names),
        "best_step": None if loop.best is None else loop.best["step"], "history": list(history),
    }  # fmt: skip


def told(loop: Loop, history: Sequence[dict[str, float]]) -> str:
    """Return a run in words."""
    text = f"{len(history)} steps, loss {history[0]['loss']:.4g} -> {history[-1]['loss']:.4g}"
    if loop.best is not None:
        text += f"; best validation {loop.best['value']:.4g} after step {loop.best['step']}, which is kept"
    return text
