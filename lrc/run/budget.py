"""What a budget must know of the program beside spectra, and what the plan says of how it was spent."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import isotonic_regression

from lrc.maps import Structure
from lrc.measure import digest
from lrc.measure.operators import NOISE, PRESENT, bucket, measure_operators
from lrc.measure.workload import Shapes, rows_per_sample, shapes_at, shapes_per_use, typical
from lrc.program import Program, Site
from lrc.ranks import Front, GroupCurve, OptionsCurve, QualityBudget, SiteCurve, Times, Unit, allocate_ranks, measured_ranks
from lrc.ranks.base import NOISE as MARGIN
from lrc.run.plan import Decision
from lrc.run.session import Session
from lrc.run.statistics import outline_of
from lrc.run.summary import outline

Table = dict[str, float]
Curves = Mapping[str, SiteCurve] | Mapping[str, GroupCurve] | Mapping[str, SiteCurve | GroupCurve] | Mapping[str, OptionsCurve]
OfProducts = Mapping[str, SiteCurve] | Mapping[str, GroupCurve] | Mapping[str, SiteCurve | GroupCurve]


def check_shapes(program: Program, session: Session, options: Any) -> None:
    """Raise UsageError for shapes that the program does not take, before anything is measured or decomposed."""
    if unit_of(options) in ("flops", "ms"):
        shapes_at(program, [program.inputs.examples], options.at)


def check_budget(program: Program, session: Session, options: Any, fqns: Sequence[str]) -> None:
    """Raise UsageError for a budget that not even the smallest ranks meet, by shapes alone, before anything is measured.

    What only a decomposition tells (a bias that the layer lacks), and times, may make another one impossible later on.
    """
    unit, round_to = unit_of(options), options.round_to
    if unit in (None, "ms"):
        return
    sites = [program.sites[fqn] for fqn in fqns]
    curves = {site.fqn: outline_of(site, options.form, min(round_to, *site.shape)) for site in sites}
    if unit == "flops":
        curves = priced(program, session, options, curves)
    rest = rest_of(program, curves)
    if not isinstance(options.rank, QualityBudget):
        allocate_ranks(list(curves.values()), options.rank, allocate="uniform", round_to=round_to, rest=rest)


def priced(program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve]) -> dict[str, SiteCurve]:
    """Return the curves with what the unit of the budget asks for: rows per sample, or times on this device."""
    unit, sites = unit_of(options), program.sites
    if unit == "flops":
        shapes = shapes_at(program, session.samples(program), options.at)
        return {fqn: replace(curve, rows=rows_per_sample(program, sites[fqn], shapes)) for fqn, curve in curves.items()}
    if unit == "ms":
        at = typical(shapes_at(program, session.samples(program), options.at))
        return timed(program, session, options, curves, at)
    return dict(curves)


def timed(
    program: Program, session: Session, options: Any, curves: Mapping[str, SiteCurve], at: Shapes
) -> dict[str, SiteCurve]:
    """Return the curves with the time of each site at the shapes `at`."""
    structures = {fqn: operators(program.sites[fqn], curve, options.round_to) for fqn, curve in curves.items()}
    tables = tables_of(program, session, structures, at)
    found = {fqn: with_times(curve, tables[fqn]) for fqn, curve in curves.items()}
    warn(session, max((curve.times.noise for curve in found.values() if curve.times is not None), default=0.0))
    return found


def tables_of(
    program: Program, session: Session, structures: Mapping[str, Mapping[str, Structure]], at: Shapes
) -> dict[str, list[Table]]:
    """Return the times of the structures of every site, in ms, a table for each of its uses; alike ones are measured once."""
    device = next(iter(program.tensors().values())).device
    model = read_in_a_run(program)
    wanted: dict[str, tuple[Mapping[str, Structure], tuple[int, ...], Site]] = {}
    uses: dict[str, list[str]] = {}
    for fqn, of_site in structures.items():
        site = program.sites[fqn]
        for shape in shapes_per_use(program, site, at):
            key = digest(of_site, shape, site.dtype, bucket(model - read_at(site)))
            wanted[key] = (of_site, shape, site)
            uses.setdefault(fqn, []).append(key)
    tables = {
        key: measure_operators(
            session.cache, of_site, shape, indices=indices(site), dtype=site.dtype, device=device,
            between=model - read_at(site),
        )
        for key, (of_site, shape, site) in session.track("time", wanted.items())
    }  # fmt: skip
    return {fqn: [tables[key] for key in keys] for fqn, keys in uses.items()}


def warn(session: Session, noise: float) -> None:
    """Note in the plan that measured times are uncertain, where they are."""
    if noise > MARGIN:
        session.notices.append(
            f"times on this device are uncertain by up to {noise:.1%}: a layer stays dense where its gain is not larger"
        )


def read_in_a_run(program: Program) -> int:
    """Return the bytes of weights that a run of the model reads: all but those of tables, of which it reads few rows."""
    return program.size()[1] - sum(site.map.cost().bytes for site in program.sites.values() if site.kind == "embedding")


def read_at(site: Site) -> int:
    """Return the bytes of weights that a run reads at one site."""
    return 0 if site.kind == "embedding" else site.map.cost().bytes


def operators(site: Site, curve: SiteCurve, round_to: int) -> dict[str, Structure]:
    """Return what is measured for a site, by name: what stands there, and products of some ranks in the forms asked for."""
    found = {PRESENT: site.map.structure()}
    for form in site.layout.forms:
        if curve.form in ("auto", form) and not curve.only:
            for rank in measured_ranks(curve, form, round_to):
                made = outline(site, rank, form, bias=bool(curve.bias or curve.extra))
                found[f"{form} {rank}"] = made.structure()
    for front in curve.fronts:
        for place in front.measured():
            ranks = front.ranks[place]
            made = outline(site, min(ranks), front.form, bias=bool(curve.bias or curve.extra), ranks=ranks)
            found[label(front, place)] = made.structure()
    return found


def label(front: Front, place: int) -> str:
    """Return the name of a product of a front in a table of times."""
    return f"{front.form} {'x'.join(map(str, front.ranks[place]))}"


def with_times(curve: SiteCurve, tables: list[Table]) -> SiteCurve:
    """Return a curve with the times of its products, all uses of the site together."""
    total = {name: sum(table[name] for table in tables) for name in tables[0]}
    fronts = []
    for front in curve.fronts:
        times = [total.pop(label(front, place), math.inf) for place in range(len(front.ranks))]
        fronts.append(replace(front, times=torch.tensor(times, dtype=torch.float64)))
    return replace(curve, times=together([total]), fronts=tuple(fronts))


def indices(site: Site) -> int:
    """Return how many indices a site's input may hold, or 0 where it holds numbers."""
    return site.in_features if site.layout.looked_up else 0


def together(tables: list[Table]) -> Times:
    """Return the summed times of all uses of a site.

    Of one form, a larger rank takes no less time: what the measured times say otherwise is noise, which the closest rising
    ones leave out.
    """
    noise = max(table.get(NOISE, 0.0) for table in tables)
    total = {name: sum(table[name] for table in tables) for name in tables[0] if name != NOISE}
    products: dict[str, dict[int, float]] = {}
    for name, ms in total.items():
        if name != PRESENT:
            form, rank = name.split()
            products.setdefault(form, {})[int(rank)] = ms
    for form, of_form in products.items():
        ranks = sorted(of_form)
        rising = isotonic_regression([of_form[rank] for rank in ranks]).x
        products[form] = dict(zip(ranks, map(float, rising), strict=True))
    return Times(total[PRESENT], products, noise)


def unit_of(options: Any) -> Unit | None:
    """Return the unit of the budget that a pass has, or None for ranks that are chosen site by site."""
    unit: Unit | None = options.rank.unit if options.rank.budget else None
    return unit


def rest_of(program: Program, curves: Curves) -> int:
    """Return the bytes of the program beside what rewriting the sites frees."""
    return program.size()[1] - int(sum(curve.present("bytes") for curve in curves.values()))


def with_latency(options: Any, curves: OfProducts, decision: Decision) -> Decision:
    """Return a decision with its measured times, where the budget is one of time."""
    if unit_of(options) != "ms" or decision.name not in curves:
        return decision
    return replace(decision, latency=costs(curves[decision.name], "ms", decision))


def spent(options: Any, curves: OfProducts, decisions: Iterable[Decision]) -> list[str]:
    """Return a line for the plan on what no other line of it shows: FLOPs per sample, or time."""
    unit = unit_of(options)
    if unit not in ("flops", "ms"):
        return []
    before = after = 0.0
    for d in decisions:
        if d.name in curves:
            was, now = costs(curves[d.name], unit, d)
            before, after = before + was, after + now
    kept = f"({after / before:.1%} kept)" if before else ""
    if unit == "flops":
        return [f"FLOPs of the targets: {before:.4g} → {after:.4g} per sample {kept}"]
    return [f"predicted latency of the targets: {before:.3g} → {after:.3g} ms {kept}, by operators timed on this device"]


def costs(curve: SiteCurve | GroupCurve, unit: Unit, decision: Decision) -> tuple[float, float]:
    """Return what a site costs before and after a decision."""
    before = curve.present(unit) + curve.fixed(unit)
    if decision.keep is not None or decision.rank is None:
        return before, before
    assert decision.form is not None, "a product has a form"
    if isinstance(curve, SiteCurve):
        return before, curve.of_choice(unit, decision.form, decision.rank, decision.ranks) + curve.fixed(unit)
    product = curve.cost(unit, decision.form, torch.tensor([decision.rank]))
    return before, float(product) + curve.fixed(unit)
