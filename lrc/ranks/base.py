"""What a rank policy is given and what it answers: spectra, sizes and a budget in, ranks out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

import torch
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema
from torch import Tensor

from lrc.spec.base import SpecModel, unknown_key
from lrc.spec.registry import RANKS, Rule

P = ParamSpec("P")
R = TypeVar("R")
Form = Literal["auto", "two_factor", "pivoted"]


@dataclass(frozen=True)
class SiteCurve:
    """What is known of one site when ranks are chosen.

    losses: loss at rank 0 … k, (k + 1,), float64, non-increasing, in the solver's unit; additive: in a unit that may be
    compared between layers. S: singular values in the solver's norm, (k,). bias: numbers of the dense layer's bias, which
    stay. extra: numbers that the rewritten layer has beyond its product and that bias (a bias that the dense one lacks).
    index: what an index vector of the outputs takes, in numbers of the weight's dtype.
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

    @property
    def dense_size(self) -> int:
        """Numbers in the dense weight."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """The largest rank there is."""
        return min(self.out_features, self.in_features)

    def form_at(self, rank: int) -> Literal["two_factor", "pivoted"]:
        """Return the form of a rank-`rank` product: as asked for, or the one that takes fewer bytes, index included."""
        if self.form != "auto":
            return self.form
        return "pivoted" if rank * rank > self.index else "two_factor"

    def size(self, rank: int) -> int:
        """Return the numbers of a rank-`rank` product in the curve's form."""
        return product_size(self.out_features, self.in_features, rank, self.form_at(rank)) + self.extra

    def sizes(self, ranks: Tensor) -> Tensor:
        """Return `size` for many ranks."""
        m, n = self.out_features, self.in_features
        shrink = torch.tensor([int(rank) * (self.form_at(int(rank)) == "pivoted") for rank in ranks], dtype=torch.int64)
        return ranks * (m + n - shrink) + self.extra


def product_size(out_features: int, in_features: int, rank: int, form: Form) -> int:
    """Return r(m + n) for two factors, r(m + n - r) for the pivoted form."""
    return rank * (out_features + in_features - (0 if form == "two_factor" else rank))


@dataclass(frozen=True)
class Choice:
    """The rank of one site, or None and the reason why it stays dense."""

    rank: int | None
    reason: str = ""


class RankPolicy(SpecModel):
    """Options of a rank policy, told apart by their one required key.

    budget: one amount over all sites together. by_shape: the rank is `most`, whatever the decomposition.
    """

    budget: ClassVar[bool] = False
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
    """Tie a policy to its options. One site: `(curve, options) -> rank`; a budget: `(curves, options, round_to, …)`."""
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
