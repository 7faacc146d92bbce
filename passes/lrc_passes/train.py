"""train: gradient steps on what passes put in place, or on the whole model; values change, structure does not.

factorize, train   ->  Chain(B, A)                   B and A (and the bias) move
adapt, train       ->  Sum(frozen W, Scale(B A))     B and A move, W does not

The graph runs in the training mode of the captured module (dropout, batch normalisation, attention dropout) and is judged
in eval mode. The captured module, and other programs that share its tensors, keep their values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer

from lrc.errors import UsageError
from lrc.measure import digest
from lrc.program import Program
from lrc.program.modes import running_statistics
from lrc.program.ownership import own
from lrc.run import Decision, PassOptions, Session, program_pass
from lrc.run.output import sha256
from lrc.run.selection import select_sites
from lrc.run.summary import summarize
from lrc.spec.base import SpecModel
from lrc.spec.registry import METRICS, OBJECTIVES, OPTIMIZERS, RECIPES, Registered
from lrc.train.checkpoint import Checkpoints
from lrc.train.data import DataField, Examples
from lrc.train.distributed import Sharded, world
from lrc.train.loop import Loop, Settings
from lrc.train.objectives import ObjectiveOptions
from lrc.train.optim import OptimizerOptions, PerLayer, Trained
from lrc.train.optim.adamw import AdamWOptions
from lrc.train.recipes import Context, Own, Recipe, RecipeOptions
from lrc.train.schedule import Schedule, ScheduleField
from lrc.train.select import Which, as_trained, trained_names
from lrc_passes.train_memory import measured, predict
from lrc_passes.train_run import Judge, Runs, examples_of
from lrc_passes.train_share import check_shares, parallel_of


class ValidationSpec(SpecModel):
    """How training is judged while it goes: by the loss on other data, or by a metric."""

    data: DataField | None = Field(default=None, description="Data of the same kind, for the objective's loss.")
    metric: Annotated[SpecModel, Registered(METRICS)] | None = Field(default=None, description="A metric with its dataset.")
    every: int = Field(default=100, ge=1, description="Steps between two.")
    patience: int | None = Field(default=None, ge=1, description="Stop after so many without a gain; never without it.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.data is None) == (self.metric is None):
            raise ValueError("give `data`, for the loss on it, or `metric`")
        return self


class Train(PassOptions):
    """Train what passes put in place, or the whole model."""

    type: Literal["train"] = "train"
    data: DataField | None = Field(
        default=None, description="A file, a factory, or a mapping; the calibration data without it."
    )
    objective: Annotated[ObjectiveOptions, Registered(OBJECTIVES)] = Field(description="What is made smaller.")
    optimizer: Annotated[OptimizerOptions, Registered(OPTIMIZERS)] = Field(
        default=AdamWOptions(), description="How parameters move: a name, or a mapping with `type`."
    )
    schedule: ScheduleField = Field(default=Schedule(), description="The learning rate over the steps.")
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Factors of the learning rate by patterns of parameters, the last match counts: `{'**.B': 16}` is LoRA+.",
    )
    parameters: Which = Field(
        default="inserted",
        description="Of the targets: what passes left trainable (inserted), that of adapt alone (adapters) or of other passes "
        "(factors); all: every parameter of the model.",
    )
    also: list[str] = Field(default=[], description="Patterns of further parameters by name: `classifier.*`.")
    steps: int | None = Field(default=None, ge=1, description="Updates; one epoch without `steps` and `epochs`.")
    epochs: float | None = Field(default=None, gt=0, description="Times through the data, in place of `steps`.")
    batch_size: int = Field(default=16, ge=1, description="Samples that run together.")
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients are averaged for one step.")
    clip: float | None = Field(default=1.0, gt=0, description="Largest norm of the gradient of all parameters together.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: products in 16 bits, by autocast; parameters keep theirs."
    )
    dropout: bool = Field(default=True, description="Use the model's own dropout rates.")
    batch_norm: Literal["update", "frozen"] = Field(
        default="update", description="Use and update the statistics of batches, or the stored ones."
    )
    per_layer: bool = Field(
        default=False,
        description="Update every parameter as soon as its gradient is known; needs `clip: null`, `accumulate: 1`.",
    )
    checkpointing: bool = Field(
        default=False,
        description="Compute the activations of repeated blocks again in the backward pass: less memory, more time.",
    )
    distributed: Literal["auto", "ddp", "fsdp2"] = Field(
        default="auto",
        description="With several processes of torchrun: every one holds all that is trained (ddp), or a share of it (fsdp2).",
    )
    seed: int = Field(default=0, ge=0, description="Of the order of the data, dropout and all else.")
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between two checkpoints.")
    recipe: Annotated[RecipeOptions | None, Registered(RECIPES, optional=True)] = Field(
        default=None, description="A method that hangs on training: a name, or a mapping with `type`."
    )
    validation: ValidationSpec | None = Field(default=None, description="How it is judged on the way; the best state is kept.")
    structural: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.per_layer and (self.clip is not None or self.accumulate > 1):
            raise ValueError("`per_layer` frees every gradient at once, so it needs `clip: null` and `accumulate: 1`")
        return self

    def datasets(self) -> dict[str, str]:
        """Return the data files of training and of its validation."""
        found = {} if self.data is None else {"data": self.data.dataset}
        if self.validation is not None:
            given = self.validation.data or self.validation.metric
            dataset = getattr(given, "dataset", None)
            found |= {"validation": dataset} if dataset else {}
        others = getattr(self.recipe, "data", None)
        return found if others is None else found | {"recipe": others.dataset}


@program_pass(Train)
class TrainPass:
    """Plan what is trained; apply trains it."""

    def plan(self, program: Program, session: Session, options: Train, index: int) -> Sequence[Decision]:
        """Return a decision for every site with trained numbers. Raises UsageError when there is nothing to train."""
        chosen = chosen_sites(program, session, options, index)
        check_shares(options, session.where(index))
        everything = trained_names(program, list(chosen), options.parameters, options.also, session.where(index))
        names = set(everything)
        tensors = program.tensors()
        decisions = []
        for fqn, site in program.sites.items():
            mine = {n for n in names if n.startswith(tuple(f"{use.module}." for use in site.uses))}
            if fqn not in program.maps:
                mine |= names & {program.names.canonical.get(site.weight_name, site.weight_name)}
            names -= mine
            if mine:
                before = summarize(site.map)
                note = f"{sum(tensors[n].numel() for n in mine)} numbers trained"
                rule = chosen.get(fqn, "also" if options.parameters != "all" else "all")
                decisions.append(Decision(index, options.type, (fqn,), rule, before, before, notes=(note,)))
        if names:
            count = sum(tensors[n].numel() for n in names)
            session.notices.append(f"train: {len(names)} tensors outside all sites are trained too, {count} numbers")
        predict(Runs.of(program, session, options, [d.sites[0] for d in decisions]), everything, index)
        return decisions

    def apply(self, program: Program, session: Session, options: Train, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Train, taking over the checkpoints of a killed run of the same content."""
        index = decisions[0].index if decisions else 0
        fqns = list(chosen_sites(program, session, options, index))
        names = trained_names(program, fqns, options.parameters, options.also, session.where(index))
        examples = examples_of(program, session, options, options.data)
        key = run_key(program, session, options, examples, names)
        statistics = running_statistics(program) if options.batch_norm == "update" else frozenset()
        parameters: dict[str, Tensor] = {**own(program, names, statistics)}
        program.settle()
        runs = Runs.of(program, session, options, [d.sites[0] for d in decisions])
        session.notices += [f"train: {note}" for note in runs.notes]
        settings = settings_of(options, examples)
        parallel = parallel_of(options, runs, parameters)
        if isinstance(parallel, Sharded):
            runs, parameters = replace(runs, student=parallel.student), parallel.parameters
            parallel.losses = runs.loss
        optimizer = optimizer_of(options, as_trained(parameters, runs.gates, options.lr_factors))
        basis = Own(
            runs.student, runs.loss, examples, options.batch_size, lambda data: examples_of(program, session, options, data)
        )
        recipe = recipe_of(options, runs, parameters, optimizer, settings, basis)
        loop = Loop(
            module=runs.student, parameters={**parameters, **recipe.tensors()},
            buffers={n: program.tensors()[n] for n in sorted(statistics)}, examples=examples, losses=runs.loss,
            optimizer=optimizer, settings=settings, checkpoints=Checkpoints(session.cache.folder / "train" / key[:32]),
            validation=validation_of(program, session, options, runs), in_backward=options.per_layer, recipe=recipe,
            parallel=parallel,
            report=lambda done, total: session.progress("train", done, total),
        )  # fmt: skip
        history = loop.run()
        session.notices += [f"train: {note}" for note in recipe.finish()]
        session.training.append(record(options, names, parameters, history, loop) | {"memory": measured(runs, loop, index)})
        session.notices.append(f"train: {told(loop, history)}")
        return [replace(d, after=summarize(program.map_of(d.sites[0]))) for d in decisions]


def settings_of(options: Train, examples: Examples) -> Settings:
    """Return how the run goes; epochs become steps."""
    batches = len(examples.epoch(options.batch_size, options.seed, 0))
    return Settings(
        steps=options.steps or max(1, math.ceil((options.epochs or 1) * batches / options.accumulate)),
        batch_size=options.batch_size, accumulate=options.accumulate, clip=options.clip, schedule=options.schedule,
        bfloat16=options.precision == "bfloat16", seed=options.seed, checkpoint_every=options.checkpoint_every,
    )  # fmt: skip


def optimizer_of(options: Train, trained: Trained) -> Optimizer:
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
    options: Train, runs: Runs, parameters: Mapping[str, Tensor], optimizer: Optimizer, settings: Settings, own: Own
) -> Recipe:
    """Return the recipe, or one that does nothing."""
    if options.recipe is None:
        return Recipe()
    batches = len(own.examples.epoch(options.batch_size, options.seed, 0))
    steps = max(1, batches // options.accumulate)
    about = Context(runs.program, runs.fqns, parameters, runs.gates, optimizer, settings.steps, steps, options.seed, own)
    made: Recipe = RECIPES.for_options(options.recipe)(about, options.recipe)
    if options.per_layer and type(made).graded is not Recipe.graded:
        raise UsageError(
            "train", message=f"the recipe `{options.recipe.type}` looks at the gradients of a step, which `per_layer` frees",
            hint="Set `per_layer: false`",
        )  # fmt: skip
    return made


def chosen_sites(program: Program, session: Session, options: Train, index: int) -> dict[str, str]:
    """Return the sites that the patterns select, with the pattern that did; with the default, all of them."""
    if options.targets == ["**"] and not options.ignore:
        return dict.fromkeys(program.sites, "**")
    return {s.fqn: s.rule for s in select_sites(program, session, options, index) if not s.keep}


def run_key(program: Program, session: Session, options: Train, examples: Examples, names: Sequence[str]) -> str:
    """Return the content hash of everything that the trained values depend on."""
    files = [session.base / dataset for dataset in options.datasets().values()]
    teacher = session.original.digest() if session.original is not None and options.objective.teacher else ""
    told = options.model_dump(mode="json", exclude={"checkpoint_every"})
    return digest(
        "train-1", program.digest(), teacher, told, list(examples.items), list(names),
        [sha256(file) for file in files if file.is_file()],
        torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
        *([world().size] if world().size > 1 else []),
    )  # fmt: skip


def validation_of(program: Program, session: Session, options: Train, runs: Runs) -> Any:
    """Return how the run is judged, or None."""
    spec = options.validation
    if spec is None:
        return None
    if spec.data is None:
        return Judge.by_metric(program, session, spec)
    examples = examples_of(program, session, options, spec.data)
    return Judge.by_loss(runs, examples, options.batch_size, spec)


def record(
    options: Train, names: Sequence[str], parameters: Any, history: Sequence[dict[str, float]], loop: Loop
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
