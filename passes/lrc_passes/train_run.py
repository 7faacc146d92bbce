"""What `train` runs: the student in both modes, the uncompressed teacher, losses and figures of validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc.data import Batch, Request
from lrc.data.text import load_tokenizer
from lrc.errors import DataError
from lrc.measure import digest
from lrc.program import Program
from lrc.program.modes import Rates, attention_rates, training_graph
from lrc.run import Session
from lrc.run.session import shapes_of
from lrc.spec.registry import METRICS, OBJECTIVES
from lrc.train.blocks import in_blocks
from lrc.train.data import Examples, TrainData, load_examples, of_batches
from lrc.train.distributed import world
from lrc.train.objectives import Step
from lrc.train.settings import Validation
from lrc.train.taps import tapped
from lrc.verify.metrics.base import Subject


@dataclass(frozen=True)
class Runs:
    """The modules of a run. student: in training mode; judged: the same tensors in eval mode; teacher: before the passes."""

    student: nn.Module
    judged: nn.Module
    teacher: nn.Module | None
    program: Program
    options: Any
    session: Session
    notes: tuple[str, ...]
    taps: tuple[str, ...]
    gates: tuple[str, ...]
    fqns: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, session: Session, options: Any, fqns: Sequence[str]) -> "Runs":
        """Make the modules; they share every tensor with the program."""
        rates = attention_rates_of(program, session) if options.dropout else None
        made = training_graph(program, dropout=options.dropout, batch_norm=options.batch_norm == "update", rates=rates)
        graph, judged = made.module, program.graph_module
        teacher = session.original.graph_module if session.original is not None and options.objective.teacher else None
        taps: tuple[str, ...] = ()
        if options.objective.taps:
            graph, taps = tapped(program, graph, list(fqns))
            judged, _ = tapped(program, judged, list(fqns))
            if session.original is not None:
                teacher, _ = tapped(session.original, session.original.graph_module, list(fqns))
        gates = [
            f"{name}.{own}"
            for name, module in graph.named_modules()
            if getattr(module, "word", None) == "gate"
            for own, _ in module.named_parameters(recurse=False)
            if own != "bias"
        ]
        notes = made.notes
        student: nn.Module = graph
        if options.checkpointing or (options.distributed == "fsdp2" and world().size > 1):
            student = blocks = in_blocks(program, graph, recompute=options.checkpointing)
            notes += tuple(blocks.notes)
        return cls(student, judged, teacher, program, options, session, notes, taps, tuple(gates), tuple(fqns))

    def loss(
        self, batch: Batch, generator: torch.Generator, *, judged: bool = False, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the objective's loss of a batch, in training or in eval mode. values: in place of parameters, by name."""
        options = self.options.objective
        mask_id, vocabulary, special = self.tokens()
        step = Step(
            batch, self.runner(self.judged if judged else self.student, values), self.teacher and self.runner(self.teacher),
            self.program.task, generator, mask_id, vocabulary, special, self.taps, self.session.allow_code,
        )  # fmt: skip
        loss = OBJECTIVES.for_options(options)(step, options)
        assert isinstance(loss, Tensor), "every objective returns a tensor"
        return loss

    def runner(self, module: nn.Module, values: Mapping[str, Tensor] | None = None) -> Any:
        """Return a function from a batch to the outputs of a module by name."""

        def run(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            filled = self.program.inputs.fill(batch)
            try:
                if values is None:
                    return module(**filled)  # type: ignore[no-any-return]  # a program returns a mapping
                return torch.func.functional_call(module, dict(values), (), filled)  # type: ignore[no-any-return]  # as above
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(
                    "train.data", message=f"the model does not run on this data: {said}",
                    hint=f"It takes {shapes_of(self.program)}; ids are below the size of its vocabulary",
                ) from error  # fmt: skip

        return run

    def tokens(self) -> tuple[int | None, int, tuple[int, ...]]:
        """Return the id of the mask token, the number of tokens and the special ones, where masked_lm asks for them."""
        folder = self.program.origin.folder
        if self.options.objective.type != "masked_lm" or folder is None:
            return None, 0, ()
        tokenizer: Any = load_tokenizer(folder)
        return tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids)


def attention_rates_of(program: Program, session: Session) -> Rates:
    """Return the dropout rates inside attention; the second capture that this takes is made once a run."""
    nodes = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    key = f"attention rates of {id(program.origin.model)}: {' '.join(node.name for node in nodes)}"
    if key not in session.memo:
        session.memo[key] = attention_rates(program)
    found: Rates = session.memo[key]
    return found


def examples_of(program: Program, session: Session, options: Any, data: TrainData | None) -> Examples:
    """Read training or validation data as the objective reads it, once a run; without any, the calibration batches."""
    request = Request(
        dataset="calibration", inputs=list(program.inputs.examples), task=program.task, tokenizer=program.origin.folder,
        base=session.base, seed=options.seed, allow_code=session.allow_code,
    )  # fmt: skip
    if data is None:
        return of_batches(session.batches, request)
    key = digest("examples", data, options.objective.reads, list(program.inputs.examples), options.seed)
    if key not in session.memo:
        session.memo[key] = load_examples(request, data, options.objective.reads)
    found: Examples = session.memo[key]
    return found


class Judge:
    """Makes validations."""

    @staticmethod
    def by_loss(runs: Runs, examples: Examples, batch_size: int, spec: Any) -> Validation:
        """Return a validation by the mean loss in eval mode. Raises DataError for data smaller than a batch."""
        batches = examples.epoch(min(batch_size, len(examples)), 0, 0)
        if not batches:
            raise DataError("train.validation", expected="at least one batch of data", got=str(len(examples)))

        def measure() -> float:
            losses = [
                float(runs.loss(examples.batch(places), torch.Generator().manual_seed(i), judged=True))
                for i, places in enumerate(batches)
            ]
            return sum(losses) / len(losses)

        return Validation(measure, spec.every, spec.patience)

    @staticmethod
    def by_metric(program: Program, session: Session, spec: Any) -> Validation:
        """Return a validation by a metric of `lrc.verify`, on its own dataset."""
        options = spec.metric
        request = Request(
            dataset=options.dataset or "", inputs=list(program.inputs.examples), task=program.task,
            tokenizer=program.origin.folder, base=session.base, draw=False, allow_code=session.allow_code,
        )  # fmt: skip

        def measure() -> float:
            return float(METRICS.for_options(options)(Subject(program, request, session.original), options))

        return Validation(measure, spec.every, spec.patience, greater=options.higher_is_better)
