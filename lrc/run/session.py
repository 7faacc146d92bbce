"""What the passes of one run share: calibration data, statistics, the cache and a way to report progress."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from lrc.data import Batches
from lrc.errors import DataError, SolverError, UsageError
from lrc.measure import Cache, collect, digest
from lrc.measure.alignment import aligned
from lrc.measure.blocks import activation_bytes
from lrc.measure.collect import changes_in_place
from lrc.measure.cotangents import has_classes
from lrc.measure.workload import Workload, shapes_at
from lrc.program import Program, Site
from lrc.ranks import FixedRank, rounded
from lrc.run.fronts import choices_of
from lrc.run.plan import Point
from lrc.run.statistics import Terms, empty_moments, generator_for, solve_all, terms_key
from lrc.run.trials import Evaluation
from lrc.solvers import Decomposition, Moments, Need, solve_blocks
from lrc.spec.document import ParetoSpec
from lrc.spec.registry import SOLVERS

T = TypeVar("T")
LARGE = 2**30  # bytes of activations from which on they are computed twice
MomentsOf = Callable[[str], Moments]


class Progress(Protocol):
    """Where a run tells how far it is."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class Session:
    """The shared state of one run.

    batches: makes the calibration batches, called at most once and only when a statistic is needed; has_data: whether there
    are any. memo: what passes measured by other ways than moments, by digest. notices: what the plan should mention beside
    the decisions (shadowed patterns, how a budget was shared); points: the budgets that were tried. evaluation: how the spec
    judges; pareto: which budgets it wants to see beside its own. allow_code: whether code that the spec names may run.
    original: the program before the passes, for those that look back at it. training: a record of every pass that trained.
    step_memory: of such a pass, by its place, the predicted peak of a step in bytes, the weights included.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        batches: Callable[[], Batches],
        seed: int = 0,
        spec_path: Path | None = None,
        progress: Progress = silent,
        has_data: bool = True,
        evaluation: Evaluation | None = None,
        pareto: ParetoSpec | None = None,
        allow_code: bool = False,
        by_block: bool | Literal["auto"] = "auto",
    ) -> None:
        self.cache = cache
        self.seed = seed
        self.progress = progress
        self.spec_path = spec_path
        self.shadowed: list[str] = []
        self.notices: list[str] = []
        self.points: list[Point] = []
        self.evaluation = evaluation
        self.pareto = pareto
        self.memo: dict[str, Any] = {}
        self.has_data = has_data
        self.allow_code = allow_code
        self.original: Program | None = None
        self.training: list[dict[str, Any]] = []
        self.step_memory: dict[int, int] = {}
        self.by_block = by_block
        self._make_batches = batches
        self._batches: Batches | None = None
        self._moments: dict[str, dict[str, Moments]] = {}
        self.workers = os.cpu_count() or 1

    @property
    def base(self) -> Path:
        """The folder that data paths of the spec start at."""
        return self.spec_path.parent if self.spec_path else Path()

    @property
    def batches(self) -> Batches:
        """The calibration batches."""
        if self._batches is None:
            self._batches = self._make_batches()
        return self._batches

    def samples(self, program: Program) -> list[Mapping[str, torch.Tensor]]:
        """Return the calibration batches, or the program's examples where the spec names no data."""
        return list(self.batches) if self.has_data else [program.inputs.examples]

    def where(self, index: int) -> str:
        """Return the place of a pass in the spec, for messages."""
        return f"{self.spec_path.name if self.spec_path else 'spec'}: passes.{index}"

    def track(self, stage: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Yield the items, reporting progress."""
        if total is None:
            items = list(items)
            total = len(items)
        self.progress(stage, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(stage, done, total)

    def measured_key(self, program: Program, needs: frozenset[Need], options: Any = None) -> str:
        """Return the content hash of everything that a collection of moments depends on."""
        if not needs:
            return "nothing"
        backward = not needs.isdisjoint({Need.GRADIENTS, Need.WEIGHT_FISHER})
        joint = [fqn for fqn, site in program.sites.items() if site.joint]
        gradients = (getattr(options, "fisher", "sampled"), getattr(options, "draws", 1)) if backward else ()
        return digest(
            "moments-2", program.digest(), list(self.batches), sorted(needs), gradients, self.seed,
            torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
            *([joint] if joint else []),
        )  # fmt: skip

    def data_key(self, program: Program) -> str:
        """Return the content hash of what all statistics depend on, whichever are needed."""
        joint = [fqn for fqn, site in program.sites.items() if site.joint]
        return digest(
            "moments-3", program.digest(), list(self.batches), joint, torch.__version__, torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
        )  # fmt: skip

    def moments(self, program: Program, fqns: Sequence[str], needs: frozenset[Need], options: Any = None) -> MomentsOf:
        """Return a function from a site's name to its moments; all `fqns` are measured together, at the first call."""
        if not needs:
            return empty_moments
        key = self.measured_key(program, needs, options)

        def of(fqn: str) -> Moments:
            if fqn not in self._moments.get(key, {}):
                self._moments = {key: self._collect(program, fqns, needs, options)}
            return self._moments[key][fqn]

        return of

    def _collect(self, program: Program, fqns: Sequence[str], needs: frozenset[Need], options: Any) -> dict[str, Moments]:
        try:
            return collect(
                program,
                self.batches,
                fqns,
                needs,
                fisher=getattr(options, "fisher", "sampled"),
                draws=getattr(options, "draws", 1),
                seed=self.seed,
                cache=self.cache,
                key=self.data_key(program),
                progress=lambda done, total: self.progress("calibrate", done, total),
                by_block=self.in_blocks(program, needs),
            )
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                "calibration",
                message=f"the model does not run on this data: {said}",
                hint=f"It takes {shapes_of(program)}",
            ) from error

    def in_blocks(self, program: Program, needs: frozenset[Need]) -> bool:
        """Say whether gradients are measured block by block: as asked, or where a batch's activations are large."""
        if self.by_block != "auto":
            return self.by_block
        if Need.GRADIENTS not in needs or Need.WEIGHT_FISHER in needs or changes_in_place(program):
            return False
        largest = max(activation_bytes(program, shapes) for shapes in shapes_at(program, self.batches, Workload()))
        return largest > LARGE

    def decompose(self, program: Program, fqns: Sequence[str], options: Any) -> Terms:
        """Return the decompositions of `fqns` for a ranked pass; those that the cache lacks are computed, in parallel."""
        solver, sites = options.solver, program.sites
        key = self.measured_key(program, solver.needs, solver)
        keys = {
            fqn: terms_key(sites[fqn], key, solver.at(sites[fqn].kind), max_rank(sites[fqn], options), self.seed)
            for fqn in fqns
        }
        choices = {fqn: choices_of(sites[fqn], options, max_rank(sites[fqn], options)) for fqn in fqns}
        terms = Terms(self.cache, keys, choices)
        missing = terms.missing()
        if missing:
            moments = self.moments(program, missing, solver.needs, solver)
            moments(missing[0])
            missing.sort(key=lambda fqn: (-sites[fqn].out_features * sites[fqn].in_features, fqn))

            def solve(fqn: str) -> str:
                terms.store(sites[fqn], self.solve(sites[fqn], moments(fqn), options))
                return fqn

            for _ in self.track("decompose", solve_all(missing, solve, self.workers), len(missing)):
                continue
        return terms

    def solve(self, site: Site, moments: Moments, options: Any, rank: int | None = None) -> Decomposition:
        """Decompose the weight of one site. Raises SolverError that names it."""
        weight, bias = site.map.dense()
        generator = generator_for(site.fqn, self.seed)
        solve, groups = SOLVERS.for_options(options.solver), site.layout.groups
        asked = moments, rank or max_rank(site, options), options.solver.at(site.kind), generator
        try:
            found = solve(weight, bias, *asked) if groups == 1 else solve_blocks(solve, weight, bias, *asked, groups)
        except SolverError as error:
            where = f"{site.fqn}: {error.where}"
            raise SolverError(where, expected=error.expected, got=error.got, hint=error.hint, message=error.message) from error
        assert isinstance(found, Decomposition)
        if site.kind == "experts" and (found.bias is not None or found.mean is not None):
            raise SolverError(
                site.fqn, message="experts have no bias that could carry a mean", hint="Set `center: false` in the solver",
            )  # fmt: skip
        return found


def settled(program: Program, options: Any) -> Any:
    """Return the options of a ranked pass with what its solver leaves to the model settled."""
    solver = options.solver.settled(logits=has_classes(program.task))
    settled_options: dict[str, Any] = {"solver": solver}
    if hasattr(options, "round_to"):
        settled_options["round_to"] = alignment(program, options)[0]
    return options.model_copy(update=settled_options)


def alignment(program: Program, options: Any) -> tuple[int, str]:
    """Return what ranks are multiples of, and for `auto` why. Measured times say by themselves which ranks are fast."""
    if options.round_to != "auto":
        return options.round_to, ""
    if options.rank.budget and options.rank.unit == "ms":
        return 1, "the times that were measured decide"
    sites = [site for site in program.sites.values() if not site.layout.looked_up] or list(program.sites.values())
    dtypes = Counter(site.dtype for site in sites)
    if not sites:
        return 1, "the model has no sites"
    device = next(iter(program.tensors().values())).device
    return aligned(device, max(dtypes, key=dtypes.__getitem__), [site.full_rank for site in sites])


def shapes_of(program: Program) -> str:
    """Return what a program takes, in words: `x: [batch, 12]`."""
    texts = []
    for name, example in program.inputs.examples.items():
        dynamic = program.inputs.dynamic.get(name, {})
        sizes = ", ".join(str(dynamic.get(dim, size)) for dim, size in enumerate(example.shape))
        texts.append(f"{name}: [{sizes}]")
    return ", ".join(texts)


def max_rank(site: Site, options: Any) -> int:
    """Return how many terms a pass can use at most. Raises UsageError for a rank that is not possible.

    All terms, for any budget to be planned from them later, unless one rank was asked for or the solver gains by fewer.
    A solver that is not nested makes exactly the terms that the rank policy will choose.
    """
    out_features, full = site.out_features // site.layout.groups, site.full_rank
    fixed = isinstance(options.rank, FixedRank)
    rank: int = options.rank.most(out_features, site.in_features)
    if fixed and rank > full:
        raise UsageError(
            site.fqn,
            expected=f"rank <= {full} (min of in_features={site.in_features}, out_features={out_features})",
            got=str(rank),
            hint="Lower `rank`, or name the site under `ignore`",
        )
    if not options.solver.nested:
        return min(full, rounded(rank, options.round_to))
    if fixed:
        return rank
    return min(full, -(-rank // options.round_to) * options.round_to) if options.solver.leading else full
