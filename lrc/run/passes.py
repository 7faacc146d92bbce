"""What a pass is, and how one is written.

A weight-level pass is a function from one site to a map (`@site_pass`): the runner finds the sites, asks the rank policy,
calls it, puts the map in place and checks the graph. A graph-level pass has the two halves of every pass itself
(`@program_pass`): `plan`, pure, and `apply`. Both are found by entry points of the group `lrc.passes`, ours and a
stranger's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from lrc.forms import NAMES as FORMS
from lrc.maps import LinearMap
from lrc.measure.workload import Workload
from lrc.program import Program, Site
from lrc.ranks import AllocateField, Auto, BreakevenRank, FixedRank, LearnedAllocation, QualityBudget, RankField
from lrc.run.plan import Decision
from lrc.solvers import CodedOptions, Decomposition, GroupOptions, Moments, Need, SolverOptions
from lrc.spec.base import Tagged
from lrc.spec.patterns import check_pattern
from lrc.spec.registry import PASSES, SOLVERS, Registered, Rule

if TYPE_CHECKING:
    from lrc.run.session import Session


class PassOptions(Tagged):
    """What every pass has: the sites that it may touch."""

    targets: list[str] = Field(
        default=["**"], min_length=1, description="Patterns of the sites to change; ordered, the last match wins."
    )
    ignore: list[str] = Field(default=[], description="Patterns of sites that stay as they are.")
    optional: bool = Field(default=False, description="Let a pattern match nothing; otherwise that is an error.")
    needs: ClassVar[frozenset[Need]] = frozenset()
    structural: ClassVar[bool] = True  # a pass that changes values alone is not carried out while planning
    looks_back: ClassVar[bool] = False  # whether it uses the program as it was before all passes

    def datasets(self) -> dict[str, str]:
        """Return the data files of the pass by the names of their options."""
        return {}

    def within(self) -> Sequence["PassOptions"]:
        """Return the passes that run in the midst of this one, in order."""
        return ()

    def obstacle_at(self, site: Site) -> str | None:
        """Return why the pass can do nothing at a site, or None: that its layout has no products, where no map stands yet."""
        return None if site.fqn in site.program.maps else site.layout.obstacle()

    @field_validator("targets", "ignore")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns


class StoredOptions(PassOptions):
    """What passes have whose maps store a weight in another way, each alone."""

    tied: Literal["keep", "untie"] = Field(
        default="keep",
        description="A weight that something else reads too: leave it dense, or give the linear a map of its own beside it, "
        "which only adds bytes.",
    )


class RankedOptions(PassOptions):
    """A pass whose maps have a rank, chosen from a decomposition of every weight."""

    solver: Annotated[SolverOptions, Registered(SOLVERS)] = Field(
        description="How a weight is decomposed: a name, or a mapping with `type`."
    )
    rank: RankField = Field(description="A rank for every site, or one budget over all of them.")
    allocate: AllocateField = Field(
        default=Auto(),
        description="How a budget over all targets is shared: an allocator's name, or a mapping with `type`; auto: global "
        "(by marginal loss per cost) where the solver's losses may be compared between layers (kfac), learned for `dobi`, else "
        "uniform.",
    )
    form: Literal[*FORMS] = Field(  # type: ignore[valid-type]  # the list of forms is one tuple
        default="auto",
        description="How a rank-r product is stored: r(m+n) or r(m+n-r) numbers; for convolutions also as several smaller "
        "ones. auto: the smaller; under a budget, for convolutions, that of the least loss for its cost.",
    )
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1,
        description="Ranks are multiples of this; auto: of as many numbers of the model's dtype as a vector of the CPU, or a "
        "tile of the GPU's tensor cores, holds; under a budget of time the measured times decide.",
    )
    at: Workload = Field(default=Workload(), description="Shapes that a budget of FLOPs or time counts at.")
    tied: Literal["keep", "untie", "joint", "error"] = Field(
        default="keep",
        description="A weight that something else reads too (a head that shares the embedding): leave it dense, give the "
        "linear its own map, let one product stand for both, or refuse.",
    )

    def obstacle_at(self, site: Site) -> str | None:
        """Return why a weight cannot be decomposed, or None; one in groups can, block by block."""
        return None if site.fqn in site.program.maps else site.layout.obstacle_in_groups(site.shape)

    @model_validator(mode="after")
    def _rank_that_the_solver_can_know(self) -> Self:
        """Refuse to choose among ranks by their losses where the solver knows the loss of one rank alone."""
        if not self.solver.nested and not self.rank.by_shape:
            (policy,) = type(self.rank).model_fields
            raise ValueError(
                f"the solver `{self.solver.type}` decomposes anew for every rank, so `rank: {{{policy}: …}}` has nothing to "
                "choose from; give a whole number, {fraction: …} or {breakeven: …}, or choose another solver"
            )
        return self

    @model_validator(mode="after")
    def _form_that_the_solver_has(self) -> Self:
        """Refuse what has no meaning for several weights together."""
        if isinstance(self.solver, GroupOptions):
            if self.form != "auto":
                raise ValueError(f"the solver `{self.solver.type}` has a form of its own; leave `form` out")
            if isinstance(self.rank, BreakevenRank):
                raise ValueError(
                    f"the solver `{self.solver.type}` decomposes several weights together, which have no one breakeven rank; "
                    "give a whole number, {fraction: …}, {energy: …} or a budget"
                )
        if isinstance(self.solver, CodedOptions):
            self._codes_have_no_product(self.solver)
        if not isinstance(self.solver, GroupOptions):
            return self
        if isinstance(self.rank, QualityBudget):
            raise ValueError(
                f"a budget of quality is for solvers of single weights; `{self.solver.type}` takes several together"
            )
        if self.allocate.measures:
            raise ValueError(
                f"`allocate: {self.allocate.type}` looks at single sites; `{self.solver.type}` takes several together"
            )
        if isinstance(self.allocate, LearnedAllocation):
            raise ValueError(
                f"`allocate: learned` trains sites one by one, and `{self.solver.type}` decomposes several together"
            )
        return self

    def _codes_have_no_product(self, solver: CodedOptions) -> None:
        if self.form != "auto" or self.tied == "joint" or self.round_to not in (1, "auto"):
            raise ValueError(f"the solver `{solver.type}` makes no product; leave `form`, `round_to` and `tied: joint` out")
        if isinstance(self.rank, BreakevenRank) or (isinstance(self.rank, FixedRank) and self.rank.rank > solver.m):
            raise ValueError(
                f"the rank of `{solver.type}` is the dimension that pieces of m={solver.m} numbers are clustered in: give a "
                "whole number of at most m, or {fraction: …} of it"
            )


def needs_of(options: PassOptions) -> frozenset[Need]:
    """Return the statistics that a pass needs, those of its solver or method among them."""
    parts = (getattr(options, name, None) for name in ("solver", "method"))
    return options.needs.union(*(getattr(part, "needs", frozenset()) for part in parts))


@dataclass(frozen=True)
class Rewrite:
    """A new map, with what the plan should say about it. rank: where it is another one than was decided."""

    map: LinearMap
    notes: tuple[str, ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Statistics:
    """What is known of one site: its calibration moments, and for a ranked pass the decomposition of its weight.

    ranks: those that were decided, where a form has several.
    """

    moments: Moments = field(default_factory=Moments)
    terms: Decomposition | None = None
    ranks: tuple[int, ...] = ()

    @property
    def decomposition(self) -> Decomposition:
        """The decomposition that every ranked pass is given."""
        assert self.terms is not None, "only a ranked pass has a decomposition"
        return self.terms


class ProgramPass(Protocol):
    """The two halves of a pass.

    One whose plan makes outlines of what `apply` will make may also have `plan_bare`, with the arguments of `plan`: the same
    decisions without the outlines, for a program that `apply` edits at once.
    """

    def plan(self, program: Program, session: "Session", options: Any, index: int) -> Sequence[Decision]:
        """Decide, changing nothing. `index` is the place of the pass in the spec."""

    def apply(self, program: Program, session: "Session", options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Edit the program as decided. Return the decisions as they were carried out (fallbacks noted)."""


def program_pass(options: type[PassOptions]) -> Callable[[type[ProgramPass]], Rule[[], ProgramPass]]:
    """Tie a class with the methods `plan` and `apply` to its options model. Registers nothing."""
    return PASSES.rule(options)


def pass_for(options: PassOptions) -> ProgramPass:
    """Return the pass that carries out `options`."""
    made: ProgramPass = PASSES.for_options(options)()
    return made
