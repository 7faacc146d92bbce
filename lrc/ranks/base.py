"""What a rank policy is given and what it answers: spectra, sizes and a budget in, ranks out."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

import torch
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema
from torch import Tensor

from lrc.ranks.candidates import Candidates, Evidence, Offer, Unit
from lrc.ranks.fronts import Front
from lrc.spec.base import SpecModel, unknown_key
from lrc.spec.registry import RANKS, Rule

P = ParamSpec("P")
R = TypeVar("R")
MEASURED = 12
NOISE = 0.03  # a measured gain that is smaller than this need not be one
ProductForm = Literal["two_factor", "pivoted"]
Form = Literal["auto", "two_factor", "pivoted"]


@dataclass(frozen=True)
class Times:
    """Measured times of one site at the user's shapes, in ms, all its uses together.

    present: as the site is now. products: form -> measured rank -> time of the product of that rank. noise: how uncertain
    they are, relative to themselves.
    """

    present: float
    products: Mapping[str, Mapping[int, float]]
    noise: float = 0.0

    def at(self, form: str, ranks: Tensor) -> Tensor:
        """Return the time of the next larger measured rank for each of `ranks`, infinite beyond the largest one, float64."""
        measured = sorted(self.products.get(form, {}).items())
        known = torch.tensor([rank for rank, _ in measured], dtype=torch.int64)
        times = torch.tensor([*(time for _, time in measured), math.inf], dtype=torch.float64)
        return times[torch.searchsorted(known, ranks.long())]


@dataclass(frozen=True)
class SiteCurve:
    """What is known of one site when ranks are chosen.

    losses: loss at rank 0 … k, (k + 1,), float64, non-increasing, in the solver's unit; additive: in a unit that may be
    compared between layers. S: singular values in the solver's norm, (k,). bias: numbers of the dense layer's bias, which
    stay. extra: numbers that the rewritten layer has beyond its product and that bias (a bias that the dense one lacks).
    index: what an index vector of the outputs takes, in numbers of the weight's dtype, `itemsize` bytes each. now: what
    the site costs as it is, beside its bias, in units where that is not what a dense weight costs. rows: output rows per
    sample, all uses together. looked_up: the input is an index, which multiplies nothing. times: what was measured, where a
    budget of time asks for it. groups: of a weight in as many blocks of rows, each of which reads inputs of its own; every
    block has the rank. fronts: products in further forms; only: those of the fronts alone are on offer. evidence: what was
    measured for an allocator.
    """

    name: str
    out_features: int
    in_features: int
    losses: Tensor
    S: Tensor
    form: Form = "auto"
    bias: int = 0
    extra: int = 0
    index: float = 0.0
    additive: bool = True
    itemsize: int = 4
    now: Mapping[Unit, float] = field(default_factory=dict)
    rows: float = 1.0
    looked_up: bool = False
    times: Times | None = None
    groups: int = 1
    fronts: tuple[Front, ...] = ()
    only: bool = False
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def dense_size(self) -> int:
        """Numbers in the dense weight."""
        return self.out_features * self.in_features

    @property
    def stored(self) -> float:
        """Bytes of what stands there, beside its bias."""
        return self.now.get("bytes", 0) or self.dense_size * self.itemsize

    @property
    def full_rank(self) -> int:
        """The largest rank there is."""
        return min(self.out_features // self.groups, self.in_features)

    def form_at(self, rank: int) -> ProductForm:
        """Return the form of a rank-`rank` product: as asked for, or the one that takes fewer bytes, index included."""
        if self.form != "auto":
            return self.form
        return "pivoted" if rank * rank > self.index else "two_factor"

    def size(self, rank: int) -> int:
        """Return the numbers of a rank-`rank` product in the curve's form."""
        return product_size(self.out_features, self.groups * self.in_features, rank, self.form_at(rank)) + self.extra

    def candidates(self, unit: Unit, round_to: int = 1) -> Candidates:
        """Return the products that cost less than the site as it is, in multiples of `round_to`, and the site as it is.

        A product that takes no fewer bytes than what stands there is none, whatever its cost in another unit, nor is one whose
        measured time is not below that of the site as it is, beyond noise.
        """
        ranks = torch.arange(0, 0 if self.only else min(len(self.losses) - 1, self.full_rank) + 1, round_to)[1:]
        pivots = torch.tensor([self.form_at(int(rank)) == "pivoted" for rank in ranks], dtype=torch.bool)
        free = unit == "ms" and self.form == "auto"  # the smaller form need not be the faster one
        offered: dict[ProductForm, Tensor] = {
            "two_factor": ranks if free else ranks[~pivots],
            "pivoted": ranks[pivots],
        }
        offers = []
        for form, of_form in offered.items():
            of_form = of_form[self.cost("bytes", form, of_form) < self.stored]
            offers.append(Offer(form, of_form, self.cost(unit, form, of_form), self.losses.double()[of_form]))
        for front in self.fronts:
            allowed = self.of_front("bytes", front) < self.stored
            offers.append(front.offer(allowed, self.of_front(unit, front)))
        below = self.present(unit) * (1 - max(NOISE, self._measured.noise) if unit == "ms" else 1)
        kind = f"{re.sub(r'[0-9]+', '*', self.name)} {self.out_features} x {self.in_features}"
        return Candidates.of(
            self.name, offers, self.present(unit), below=below, fixed=self.fixed(unit), kind=kind, evidence=self.evidence
        )

    def cost(self, unit: Unit, form: ProductForm, ranks: Tensor) -> Tensor:
        """Return what products of `ranks` (k,) in `form` cost beside the dense bias, (k,), float64."""
        m, n = self.out_features, self.groups * self.in_features
        product = (ranks * (m + n - (ranks if form == "pivoted" else 0))).double()
        if unit == "numbers":
            return product + self.extra
        if unit == "bytes":
            return (product + self.extra + (self.index if form == "pivoted" else 0)) * self.itemsize
        if unit == "flops":
            multiplied = ranks * m if self.looked_up else product
            return (2 * multiplied + self.extra) * self.rows
        return self._measured.at(form, ranks)

    def of_front(self, unit: Unit, front: Front) -> Tensor:
        """Return what the products of a front cost beside the dense bias, (k,), float64."""
        return front.costs(unit, self.extra, self.rows, self.itemsize)

    def of_choice(self, unit: Unit, form: str, rank: int, ranks: tuple[int, ...]) -> float:
        """Return what one product costs beside the dense bias."""
        for front in self.fronts:
            if front.form == form:
                return float(self.of_front(unit, front)[front.place(ranks or (rank,))])
        return float(self.cost(unit, form, torch.tensor([rank])))  # type: ignore[arg-type]  # of a product

    def present(self, unit: Unit) -> float:
        """Return what the site costs as it is, beside its bias; the bytes are those that rewriting it frees."""
        if unit == "ms":
            return self._measured.present
        if unit == "flops":
            return self.now.get(unit, 2 * self.dense_size) * self.rows
        return self.now.get(unit, self.dense_size * (self.itemsize if unit == "bytes" else 1))

    def fixed(self, unit: Unit) -> float:
        """Return what the bias costs, which stays: its bytes are with the rest of the model, its time in the measured one."""
        return {"numbers": self.bias, "flops": self.bias * self.rows}.get(unit, 0.0)

    @property
    def _measured(self) -> Times:
        assert self.times is not None, "a budget of time needs measured times"
        return self.times


def measured_ranks(curve: SiteCurve, form: ProductForm, round_to: int = 1) -> list[int]:
    """Return the ranks at which products of a site are timed: some MEASURED of them, evenly spaced, and two smaller ones.

    All are multiples of `round_to`, or of 8 where nothing is asked for: the sizes at which kernels run best. None needs as
    many bytes as what stands there.
    """
    ranks = torch.arange(0, curve.full_rank + 1, round_to)[1:]
    ranks = ranks[curve.cost("bytes", form, ranks) < curve.stored]
    top = int(ranks[-1]) if len(ranks) else 0
    grain = 8 if round_to == 1 and top >= 4 * MEASURED else round_to
    step = max(1, math.ceil(top / MEASURED / grain)) * grain
    smaller = [step // part for part in (4, 2) if step // part and step // part % grain == 0]
    return [rank for rank in [*smaller, *range(step, top + 1, step)] if rank <= top]


def product_size(out_features: int, in_features: int, rank: int, form: Form) -> int:
    """Return r(m + n) for two factors, r(m + n - r) for the pivoted form."""
    return rank * (out_features + in_features - (0 if form == "two_factor" else rank))


@dataclass(frozen=True)
class Choice:
    """The rank and form of one site, or None and the reason why it stays dense. ranks: all of them, where there are several."""

    rank: int | None
    reason: str = ""
    form: str = ""
    ranks: tuple[int, ...] = ()


class RankPolicy(SpecModel):
    """Options of a rank policy, told apart by their one required key.

    budget: one amount over all sites together; unit: what it is an amount of. by_shape: the rank is `most`, whatever the
    decomposition. by_scores: it looks at no decomposition either, but at what is known of the sites beside their weights.
    """

    budget: ClassVar[bool] = False
    by_scores: ClassVar[bool] = False
    unit: ClassVar[Unit] = "numbers"
    by_shape: ClassVar[bool] = False

    def most(self, out_features: int, in_features: int) -> int:
        """Return a bound on the ranks that the policy may choose, from the shape alone."""
        return min(out_features, in_features)


class FixedRank(RankPolicy):
    """The same rank everywhere; in the file the bare number."""

    rank: int = Field(ge=1, description="columns of B, rows of A")
    by_shape: ClassVar[bool] = True

    def most(self, out_features: int, in_features: int) -> int:
        """Return the rank itself."""
        return self.rank


def rank_policy(options: type[RankPolicy]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a policy to its options. One site: `(curve, options) -> rank`; budget: `(curves, options, setting) -> Allocation`."""
    return RANKS.rule(options)


class RankValue:
    """Annotation of the field `rank`: a whole number, or a mapping with exactly one key of a registered policy."""

    def validate(self, value: Any) -> RankPolicy:
        """Return the options model. Raises what pydantic reports with its place."""
        if isinstance(value, RankPolicy):
            return value
        known = [rule.name for rule in RANKS if rule.options is not FixedRank]
        if isinstance(value, int) and not isinstance(value, bool):
            return FixedRank.model_validate({"rank": value})
        if isinstance(value, dict) and len(value) == 1:
            key = next(iter(value))
            if key not in known and key != "rank":
                raise unknown_policy(key, known)
            made = RANKS.get(key).options.model_validate(value)
            assert isinstance(made, RankPolicy)
            return made
        got = "a bare fraction" if isinstance(value, float) else f"{value!r}"
        raise PydanticCustomError(
            "rank_type",
            "expected a whole number or exactly one of {known}, got {got}",
            {"known": ", ".join(f"{{{name}: …}}" for name in known), "got": got},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(_as_written)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        models = [handler(rule.options.__pydantic_core_schema__) for rule in RANKS if rule.options is not FixedRank]
        return {"anyOf": [{"type": "integer", "minimum": 1}, *models]}


def _as_written(policy: RankPolicy) -> Any:
    return policy.rank if isinstance(policy, FixedRank) else policy.model_dump()


def unknown_policy(key: Any, known: list[str]) -> Exception:
    """Return the error of a policy that is not known, which names the nearest one."""
    from pydantic import ValidationError

    return ValidationError.from_exception_data("rank", [unknown_key(key, known)])


RankField = Annotated[RankPolicy, RankValue()]
