"""What a budget must know of the program beside spectra, and what the plan says of how it was spent."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lrc.measure.workload import rows_per_sample, shapes_at
from lrc.program import Program
from lrc.ranks import SiteCurve, Unit
from lrc.run.plan import Decision
from lrc.run.session import Session


def priced(program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve]) -> dict[str, SiteCurve]:
    """Return the curves with what the unit of the budget asks for: rows per sample for FLOPs."""
    if unit_of(options) != "flops":
        return dict(curves)
    shapes = shapes_at(program, session.samples(program), options.at)
    sites = program.sites
    return {fqn: replace(curve, rows=rows_per_sample(program, sites[fqn], shapes)) for fqn, curve in curves.items()}


def unit_of(options: Any) -> Unit | None:
    """Return the unit of the budget that a pass has, or None for ranks that are chosen site by site."""
    unit: Unit | None = options.rank.unit if options.rank.budget else None
    return unit


def rest_of(program: Program, curves: Mapping[str, SiteCurve]) -> int:
    """Return the bytes of the program beside what rewriting the sites frees."""
    return program.size()[1] - int(sum(curve.present("bytes") for curve in curves.values()))


def spent(options: Any, curves: Mapping[str, SiteCurve], decisions: Iterable[Decision]) -> list[str]:
    """Return a line for the plan on what no other line of it shows: FLOPs per sample."""
    if unit_of(options) != "flops":
        return []
    before = after = 0.0
    for d in decisions:
        if d.name in curves:
            was, now = costs(curves[d.name], "flops", d)
            before, after = before + was, after + now
    return [f"FLOPs of the targets: {before:.4g} → {after:.4g} per sample ({after / max(before, 1):.1%} kept)"]


def costs(curve: SiteCurve, unit: Unit, decision: Decision) -> tuple[float, float]:
    """Return what a site costs before and after a decision."""
    before = curve.present(unit) + curve.fixed(unit)
    if decision.keep is not None or decision.rank is None:
        return before, before
    product = curve.cost(unit, decision.form, torch.tensor([decision.rank]))  # type: ignore[arg-type]  # of a product
    return before, float(product) + curve.fixed(unit)
