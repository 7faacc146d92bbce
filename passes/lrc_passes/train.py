"""train: gradient steps on what passes put in place, or on the whole model; values change, structure does not.

factorize, train   ->  Chain(B, A)                   B and A (and the bias) move
adapt, train       ->  Sum(frozen W, Scale(B A))     B and A move, W does not

The graph runs in the training mode of the captured module (dropout, batch normalisation, attention dropout) and is judged
in eval mode. The captured module, and other programs that share its tensors, keep their values.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lrc.program import Program
from lrc.run import Decision, PassOptions, Session, program_pass
from lrc.run.selection import select_sites
from lrc.run.summary import summarize
from lrc.spec.base import SpecModel
from lrc.spec.registry import METRICS, OBJECTIVES, OPTIMIZERS, RECIPES, Registered
from lrc.train.data import DataField
from lrc.train.objectives import ObjectiveOptions
from lrc.train.optim import OptimizerOptions
from lrc.train.optim.adamw import AdamWOptions
from lrc.train.recipes import RecipeOptions
from lrc.train.schedule import Schedule, ScheduleField
from lrc.train.select import Which, trained_names
from lrc_passes.train_during import DuringField, carried_out, check_during, in_order, stretches
from lrc_passes.train_memory import predict
from lrc_passes.train_part import Training
from lrc_passes.train_run import Runs
from lrc_passes.train_share import check_shares


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
    during: list[DuringField] = Field(
        default=[],
        description="Passes that run in the midst of training, which goes on with what they left: a pass alone runs at the "
        "middle, `{at: [0.25, 0.5], passes: […]}` at shares of the steps.",
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
        if self.recipe is not None and self.recipe.teacher and not self.objective.teacher:
            raise ValueError(
                f"the recipe `{self.recipe.type}` follows the uncompressed model, and `objective: {self.objective.type}` does "
                "not look at it; give `distillation` or `reconstruction`"
            )
        return self

    def datasets(self) -> dict[str, str]:
        """Return the data files of training and of its validation."""
        found = {} if self.data is None else {"data": self.data.dataset}
        if self.validation is not None:
            given = self.validation.data or self.validation.metric
            dataset = getattr(given, "dataset", None)
            found |= {"validation": dataset} if dataset else {}
        others = getattr(self.recipe, "data", None)
        found |= {} if others is None else {"recipe": others.dataset}
        return found | {
            f"during.{i}.{key}": name for i, one in enumerate(self.within()) for key, name in one.datasets().items()
        }

    def within(self) -> list[PassOptions]:
        """Return the passes that run meanwhile, as often as they do."""
        return [options for _, options in in_order(self.during)]


@program_pass(Train)
class TrainPass:
    """Plan what is trained; apply trains it."""

    def plan(self, program: Program, session: Session, options: Train, index: int) -> Sequence[Decision]:
        """Return a decision for every site with trained numbers. Raises UsageError when there is nothing to train."""
        chosen = chosen_sites(program, session, options, index)
        check_shares(options, session.where(index))
        check_during(options, session.where(index))
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
        """Train in stretches, with the passes that run between them."""
        index = decisions[0].index if decisions else 0
        training = Training.of(program, session, options, index)
        trained, made = [d.sites[0] for d in decisions], list[Decision]()
        for stretch in stretches(options.during, training.settings.steps):
            fqns = list(chosen_sites(program, session, options, index))
            names = trained_names(program, fqns, options.parameters, options.also, session.where(index))
            training.run(stretch.part, [fqn for fqn in trained if fqn in program.sites], names)
            made += carried_out(program, session, stretch.passes, index, stretch.part.end)
        after = {fqn: summarize(program.map_of(fqn)) for fqn in trained if fqn in program.sites}
        return [*(replace(d, after=after.get(d.sites[0], d.after)) for d in decisions), *made]


def chosen_sites(program: Program, session: Session, options: Train, index: int) -> dict[str, str]:
    """Return the sites that the patterns select, with the pattern that did; with the default, all of them."""
    if options.targets == ["**"] and not options.ignore:
        return dict.fromkeys(program.sites, "**")
    return {s.fqn: s.rule for s in select_sites(program, session, options, index) if not s.keep}
