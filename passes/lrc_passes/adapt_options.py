"""The options of the pass `adapt`, in our names and in PEFT's."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lrc.initialisers import InitialiserOptions
from lrc.program import Site
from lrc.ranks import Choice, FixedRank, RankField, SiteCurve, allocate_ranks
from lrc.run import AdapterOptions, PassOptions
from lrc.solvers import Need
from lrc.spec.registry import ADAPTERS, INITIALISERS, Registered
from lrc_passes.adapters.lora import Lora

PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init"}
PEFT_INITS: dict[Any, Any] = {True: "kaiming", False: "random", "lora_ga": "lora_ga_hf"}


class Adapt(PassOptions):
    """Put trained low-rank maps beside frozen weights."""

    type: Literal["adapt"] = "adapt"
    method: Annotated[AdapterOptions, Registered(ADAPTERS)] = Field(
        default=Lora(), description="Which maps are added: a name, or a mapping with `type`."
    )
    rank: RankField | None = Field(default=None, description="The adapter's rank; the method's own default (LoRA: 8) without.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        strict=False,
        description="LoRA scales by alpha / rank; the method's own default (LoRA: 16) without.",
    )
    init: Annotated[InitialiserOptions | None, Registered(INITIALISERS, optional=True)] = Field(
        default=None, description="Where the factors start: a name, or a mapping with `type`; the method's own default without."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, strict=False, description="Share of an adapter's inputs left out in training."
    )
    rank_pattern: dict[str, int] = Field(
        default={}, description="Ranks of single sites: a regular expression for the end of a name, as PEFT has it."
    )
    alpha_pattern: dict[str, float] = Field(default={}, description="The same for alpha.")
    gradient_mb: float = Field(
        default=64.0, ge=0, strict=False, description="Megabytes of weight gradients that are held at a time, where the "
        "initialiser wants gradients; at least one weight's. The calibration data runs once for each such share."
    )  # fmt: skip
    tied: Literal["keep", "untie", "error"] = Field(
        default="keep",
        description="A weight that something else reads too (a head that shares the embedding): leave it, adapt this use of it "
        "alone, or refuse.",
    )

    @model_validator(mode="before")
    @classmethod
    def _in_our_names(cls, data: Any) -> Any:
        """Turn PEFT's spellings into ours."""
        return translated(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _that_fits_together(self) -> Self:
        if self.init is not None and self.method.default_init is None:
            raise ValueError(f"`method: {self.method.type}` starts by itself and takes no `init`")
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError("every rank of `rank_pattern` is at least 1")
        if self.rank is not None and not (self.rank.by_shape or self.rank.by_scores):
            raise ValueError("an adapter's rank is a whole number, {fraction: …}, {breakeven: …} or {contribution: …}")
        return self

    def obstacle_at(self, site: Site) -> str | None:
        """Return None: the method says what it can do at a site of this rank."""
        return None

    @property
    def start(self) -> InitialiserOptions | None:
        """The initialiser: the spec's, or the method's own."""
        return self.init or self.method.default_init

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # of a pass it is a constant
        """What must be measured for the initialiser."""
        return frozenset() if self.start is None else self.start.needs

    def rank_of(self, fqn: str, shape: tuple[int, int]) -> int:
        """Return the rank that the spec gives to a site of this shape."""
        own = matching(self.rank_pattern, fqn)
        if own is not None:
            return int(self.rank_pattern[own])
        return (self.rank or FixedRank(rank=self.method.rank_for(shape))).most(*shape)

    def ranks_of(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Choice]:
        """Return the rank that the spec gives to every site, or why it has none. shapes: (out, in)_features by site."""
        if self.rank is None or self.rank.by_shape:
            return {fqn: Choice(self.rank_of(fqn, shape)) for fqn, shape in shapes.items()}
        nothing = torch.empty(0)
        curves = [SiteCurve(fqn, *shape, losses=nothing, S=nothing, form="two_factor") for fqn, shape in shapes.items()]
        shared = allocate_ranks(curves, self.rank, allocate="uniform").choices
        own = {fqn: matching(self.rank_pattern, fqn) for fqn in shapes}
        return {fqn: choice if own[fqn] is None else Choice(self.rank_pattern[own[fqn]]) for fqn, choice in shared.items()}

    def alpha_of(self, fqn: str) -> float | None:
        """Return the alpha that the spec gives to a site."""
        own = matching(self.alpha_pattern, fqn)
        if own is not None:
            return self.alpha_pattern[own]
        return self.method.default_alpha if self.alpha is None else self.alpha


def matching(patterns: Mapping[str, Any], fqn: str) -> str | None:
    """Return the first pattern that a name ends with, as PEFT matches them."""
    return next((p for p in patterns if re.fullmatch(rf"(.*\.)?({p})", fqn)), None)


def translated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with PEFT's names (`r`, `lora_alpha`, `use_dora`, …) in ours. Raises ValueError for both at once."""
    made = dict(data)
    for theirs, ours in PEFT_NAMES.items():
        if theirs in made:
            if ours in made:
                raise ValueError(f"`{theirs}` is `{ours}` in PEFT's spelling: give one of them")
            made[ours] = made.pop(theirs)
    for theirs, ours in (("target_modules", "targets"), ("exclude_modules", "ignore")):
        if theirs in made:
            names = made.pop(theirs)
            made[ours] = [f"re:{names}"] if isinstance(names, str) else [rf"re:(.*\.)?{re.escape(n)}" for n in names]
            if names == "all-linear":
                made[ours] = ["**"]
    stabilised, weighted = made.pop("use_rslora", False), made.pop("use_dora", False)
    if (stabilised or weighted) and "method" in made:
        raise ValueError("`use_rslora` and `use_dora` choose the method: leave `method` out")
    if weighted:
        made["method"] = {"type": "dora", "rslora": bool(stabilised)}
    elif stabilised:
        made["method"] = "rslora"
    init = made.get("init")
    if isinstance(init, bool) or (init == "lora_ga" and "init_lora_weights" in data):
        made["init"] = PEFT_INITS[init]
    elif isinstance(init, str) and (found := re.fullmatch(r"pissa_niter_(\d+)", init)):
        made["init"] = {"type": "pissa", "niter": int(found[1])}
    return made
