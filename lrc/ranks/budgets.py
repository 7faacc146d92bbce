"""Budgets over all sites together: an amount of numbers, bytes, FLOPs or time, shared by an allocator."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from lrc.errors import UsageError
from lrc.ranks.allocate import AllocatorOptions
from lrc.ranks.base import Choice, RankPolicy, SiteCurve, rank_policy
from lrc.ranks.candidates import Budget, Candidates, Places, Unit, total_cost
from lrc.ranks.joint import GroupCurve
from lrc.ranks.mixed import MixedCurve
from lrc.ranks.options import OptionsCurve
from lrc.spec.registry import ALLOCATORS

Curve = SiteCurve | GroupCurve | MixedCurve | OptionsCurve
Search = Callable[[Sequence[Candidates], Budget, Sequence[int]], Places]  # from the places of another allocator


@dataclass(frozen=True)
class Verdict:
    """What a metric says of a model: its value, whether that is within the bound, and both in words."""

    metric: str
    value: float
    ok: bool
    text: str


Judge = Callable[[Mapping[str, Choice]], Verdict]


@dataclass(frozen=True)
class Setting:
    """What stands beside a budget: who shares it, the multiple that ranks are of, and the bytes of the rest of the model.

    judge: makes the model of some choices and measures it; only a budget of quality asks for it. search: what improves the
    places of `allocate` with the model at hand, where they are learned. key: how the spec names the budget, `rank` or `budget`.
    """

    allocate: AllocatorOptions
    round_to: int = 1
    rest: int = 0
    judge: Judge | None = None
    search: Search | None = None
    key: str = "rank"


@dataclass(frozen=True)
class Tried:
    """A budget that was tried on the model: its name and amount, what it chose, and what was found."""

    budget: str
    amount: float
    choices: dict[str, Choice]
    verdict: Verdict


@dataclass(frozen=True)
class Allocation:
    """Every site's choice, what the plan should say of how it came about, and the budgets that were tried on the way."""

    choices: dict[str, Choice]
    notes: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()


class BudgetPolicy(RankPolicy):
    """One amount over all targets."""

    budget: ClassVar[bool] = True


class ParamsKept(BudgetPolicy):
    """Keep a fraction of the parameters of all targets together."""

    params_kept: float = Field(gt=0, le=1, description="kept fraction of the weights' numbers, no unit")


@rank_policy(ParamsKept)
def params_kept(curves: Sequence[Curve], options: ParamsKept, setting: Setting) -> Allocation:
    """Return a rank for every site such that all together need at most `options.params_kept` of the dense numbers.

    Biases are counted, before and after; index vectors are bytes, not parameters. Raises UsageError when not even the
    smallest ranks fit.
    """
    return kept_share(curves, options, "params_kept", options.params_kept, setting)


class SizeMb(BudgetPolicy):
    """Keep the whole model within a size: the targets get what the rest of the model leaves."""

    size_mb: float = Field(gt=0, description="stored bytes of the whole model, index vectors included, in MB of 1e6 bytes")
    unit: ClassVar[Unit] = "bytes"


@rank_policy(SizeMb)
def size_mb(curves: Sequence[Curve], options: SizeMb, setting: Setting) -> Allocation:
    """Return a rank for every site such that the model stores at most `options.size_mb` million bytes.

    setting.rest: bytes of everything beside the weights that the sites may free. Raises UsageError when not even the
    smallest ranks fit.
    """
    sites = [curve.candidates("bytes", setting.round_to) for curve in curves]
    amount = math.floor(options.size_mb * 1e6 + 1e-6) - setting.rest
    least, whole = total_cost(sites, [0] * len(sites)), sum(float(site.costs[-1]) for site in sites)
    if least > amount:
        raise refusal(f"{setting.key}.size_mb", (least + setting.rest) / 1e6, options.size_mb)
    return share_out(sites, Budget(amount, min(1.0, amount / whole) if whole else 1.0), setting, "bytes")


class BytesKept(BudgetPolicy):
    """Keep a fraction of the stored bytes of all targets together, biases beside."""

    bytes_kept: float = Field(gt=0, le=1, description="kept fraction of the weights' bytes, no unit")
    unit: ClassVar[Unit] = "bytes"


@rank_policy(BytesKept)
def bytes_kept(curves: Sequence[Curve], options: BytesKept, setting: Setting) -> Allocation:
    """Return a rank for every site such that all together store at most `options.bytes_kept` of their bytes of now.

    Raises UsageError when not even the smallest ranks fit.
    """
    return kept_share(curves, options, "bytes_kept", options.bytes_kept, setting)


class FlopsKept(BudgetPolicy):
    """Keep a fraction of the FLOPs of all targets together, at the shapes of the calibration (or `at`)."""

    flops_kept: float = Field(gt=0, le=1, description="kept fraction of the targets' FLOPs, no unit")
    unit: ClassVar[Unit] = "flops"


@rank_policy(FlopsKept)
def flops_kept(curves: Sequence[Curve], options: FlopsKept, setting: Setting) -> Allocation:
    """Return a rank for every site such that all together need at most `options.flops_kept` of the FLOPs they need now.

    A site counts by its output rows per sample (a pooler gives one). A multiply-add counts 2, an added bias 1. Raises
    UsageError when not even the smallest ranks fit.
    """
    return kept_share(curves, options, "flops_kept", options.flops_kept, setting)


class LatencyKept(BudgetPolicy):
    """Keep a fraction of the time that all targets together take on this device, at the calibration's shapes (or `at`)."""

    latency_kept: float = Field(gt=0, le=1, description="kept fraction of the targets' measured time, no unit")
    unit: ClassVar[Unit] = "ms"


@rank_policy(LatencyKept)
def latency_kept(curves: Sequence[Curve], options: LatencyKept, setting: Setting) -> Allocation:
    """Return a rank for every site such that the measured times add up to at most `options.latency_kept` of those of now.

    A site gets no rank whose measured time is not below its own. Raises UsageError when not even the fastest ranks fit.
    """
    return kept_share(curves, options, "latency_kept", options.latency_kept, setting)


class LatencyMs(BudgetPolicy):
    """Keep the time of all targets together within an amount, on this device, at the calibration's shapes (or `at`)."""

    latency_ms: float = Field(gt=0, description="measured time of all targets together, in ms")
    unit: ClassVar[Unit] = "ms"


@rank_policy(LatencyMs)
def latency_ms(curves: Sequence[Curve], options: LatencyMs, setting: Setting) -> Allocation:
    """Return a rank for every site such that the measured times add up to at most `options.latency_ms`.

    A site gets no rank whose measured time is not below its own. Raises UsageError when not even the fastest ranks fit.
    """
    return within_amount(curves, options, "latency_ms", options.latency_ms, setting)


def within_amount(curves: Sequence[Curve], options: RankPolicy, key: str, amount: float, setting: Setting) -> Allocation:
    """Share out an amount in the unit of `options`."""
    sites = [curve.candidates(options.unit, setting.round_to) for curve in curves]
    fixed = sum(site.fixed for site in sites)
    whole = fixed + sum(float(site.costs[-1]) for site in sites)
    least = fixed + total_cost(sites, [0] * len(sites))
    if least > amount:
        raise refusal(f"{setting.key}.{key}", least, amount)
    return share_out(sites, Budget(amount - fixed, min(1.0, amount / whole) if whole else 1.0), setting, options.unit)


def kept_share(curves: Sequence[Curve], options: RankPolicy, key: str, kept: float, setting: Setting) -> Allocation:
    """Share out a fraction of what all sites cost now in the unit of `options`."""
    return within_share(curves, options.unit, kept, setting, key)


def within_share(curves: Sequence[Curve], unit: Unit, kept: float, setting: Setting, key: str = "") -> Allocation:
    """Share out a fraction of what all sites cost now. Raises UsageError, on `key`, where the smallest ranks cost more."""
    sites = [curve.candidates(unit, setting.round_to) for curve in curves]
    fixed = sum(site.fixed for site in sites)
    whole = fixed + sum(float(site.costs[-1]) for site in sites)
    amount = kept * whole * (1 + 1e-12)  # so that rounding does not refuse a share that is met exactly
    least = fixed + total_cost(sites, [0] * len(sites))
    if least > amount:
        raise refusal(f"{setting.key}.{key}", least / whole, kept)
    return share_out(sites, Budget(amount - fixed, kept), setting, unit)


def refusal(key: str, least: float, got: float) -> UsageError:
    """Return the error of a budget that not even the smallest ranks fit; it names one that they fit."""
    digits = 10 ** (3 - math.floor(math.log10(least)))  # four of them, rounded up
    least = math.ceil(least * digits) / digits
    which = "fastest" if ".latency" in key else "smallest"
    what = "ranks" if key.startswith("rank.") else "options"
    return UsageError(key, expected=f"at least {least:g} (the {which} {what} everywhere)", got=f"{got:g}")


WORTH: dict[Unit, str] = {
    "numbers": "its parameters are",
    "bytes": "its bytes are",
    "flops": "its FLOPs are",
    "ms": "its time is",
}
SMALLER: dict[Unit, str] = {"numbers": "smaller", "bytes": "smaller", "flops": "cheaper", "ms": "faster"}


def share_out(sites: Sequence[Candidates], budget: Budget, setting: Setting, unit: Unit) -> Allocation:
    """Return the choices of the setting's allocator."""
    places, notes = ALLOCATORS.for_options(setting.allocate)(sites, setting.allocate, budget)
    if setting.search is not None:
        places, notes = setting.search(sites, budget, places)
    return Allocation({site.name: _choice(site, place, unit) for site, place in zip(sites, places, strict=True)}, notes)


def _choice(site: Candidates, place: int, unit: Unit) -> Choice:
    if place < len(site.ranks):
        return Choice(site.ranks[place], form=site.forms[place], ranks=site.every[place] if site.every else ())
    if not site.ranks:
        return Choice(None, f"no rank makes it {SMALLER[unit]}")
    return Choice(None, f"the budget leaves it dense: {WORTH[unit]} worth more here than elsewhere")
