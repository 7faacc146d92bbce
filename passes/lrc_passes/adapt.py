"""adapt: small trained maps beside frozen weights.

X  ->  Sum(base: X*, adapter: Scale(s, Chain(B, A)))      method: lora; every other method is an expression of the same kind

%y = linear(%x, fc.weight, fc.bias)
%h = linear(%x, fc.adapter.inner.A);  %y = linear(%x, fc.base, fc.bias) + s * linear(%h, fc.adapter.inner.B)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc.errors import LrcError, SiteError, UsageError
from lrc.initialisers import Initial, InitialiserOptions, Start
from lrc.maps import LinearMap
from lrc.program import Adapted, Program, Site
from lrc.ranks import Choice
from lrc.run import Decision, Keep, Place, Rewrite, Session, program_pass
from lrc.run.selection import select_sites
from lrc.run.site_pass import carried_out, put
from lrc.run.statistics import generator_for
from lrc.run.summary import standing
from lrc.spec.registry import ADAPTERS, INITIALISERS
from lrc_passes.adapt_options import Adapt, matching
from lrc_passes.adapt_sources import findings, sources


@program_pass(Adapt)
class AdaptPass:
    """Decides the ranks, then has every site's map made by the method."""

    def plan(self, program: Program, session: Session, options: Adapt, index: int) -> Sequence[Decision]:
        """Decide for every selected site; no factor is computed, but what an initialiser needs for its ranks is measured."""
        decided = self.plan_bare(program, session, options, index)
        shapes = [program.sites[d.sites[0]].shape for d in decided if d.keep is None]
        task = Work(program, session, options, {"shapes": shapes}, True)

        def outlined(d: Decision) -> Decision:
            if d.keep is not None:
                return d
            assert d.rank is not None, "an adapter that is not kept has a rank"
            return carried_out(d, self.make(task, program.sites[d.sites[0]], d.rank)[0])

        return [outlined(d) for d in decided]

    def plan_bare(self, program: Program, session: Session, options: Adapt, index: int) -> Sequence[Decision]:
        """Decide for every selected site, without an outline of its map."""
        selected = select_sites(program, session, options, index)
        check_patterns(options, [s.fqn for s in selected], session.where(index))
        given = options.ranks_of({s.fqn: program.sites[s.fqn].shape for s in selected if not s.keep})
        wanted = {fqn: choice.rank or 0 for fqn, choice in given.items()}
        reasons = {s.fqn: s.keep or refused(program.sites[s.fqn], given[s.fqn], options) for s in selected}
        ranks = settled(program, session, options, {fqn: rank for fqn, rank in wanted.items() if reasons[fqn] is None})
        decisions = []
        for chosen in selected:
            site, rank = program.sites[chosen.fqn], ranks.get(chosen.fqn, wanted.get(chosen.fqn, 0))
            before = standing(site)
            decision = Decision(
                index, options.type, (site.fqn,), chosen.rule, before, before, rank=rank, full_rank=min(site.shape)
            )
            reason = reasons[chosen.fqn]
            if reason is None and rank == 0 and options.start is not None:
                reason = f"`init: {options.start.type}` gives its rank to other sites"
            decisions.append(carried_out(decision, Keep(reason)) if reason else decision)
        return decisions

    def apply(self, program: Program, session: Session, options: Adapt, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Make every adapter and put it in place; whatever is no adapter is trained no more."""
        work = [d for d in decisions if d.keep is None]
        wanted = {d.sites[0]: asked(program.sites[d.sites[0]], d.rank, options) for d in work}
        of = sources(program, session, options.start, wanted, int(options.gradient_mb * 2**20))
        done = {d.name: d for d in decisions}
        shared = {
            "shapes": [program.sites[d.sites[0]].shape for d in work], "options": options.method.model_dump(exclude={"type"}),
        }  # fmt: skip
        task = Work(program, session, options, shared, False)
        program.freeze()
        made = {}
        for d in session.track(options.type, work):
            site = program.sites[d.sites[0]]
            assert d.rank is not None, "an adapter that is not kept has a rank"
            made[d] = self.make(task, site, d.rank, of(site.fqn))
        program.raise_sites([d.sites[0] for d, (new, _) in made.items() if isinstance(new, Rewrite)])
        for d, (new, kept) in made.items():
            done[d.name] = put(program, replace(d, notes=()), new)
            if kept is not None:
                program.adapters[d.sites[0]] = kept
        program.settle()
        return list(done.values())

    def make(
        self, task: "Work", site: Site, rank: int, source: dict[str, Any] | None = None
    ) -> tuple[Rewrite | Keep, Adapted | None]:
        """Call the method at one site. Returns its map, and what is remembered of it."""
        options = task.options
        alpha = alpha_for(site, rank, options)
        scaling = options.method.scaling(rank, alpha)
        generator = generator_for(site.fqn, task.session.seed)
        place = Place(
            site, rank=rank, scaling=scaling, generator=generator, dropout=options.dropout, planning=task.planning,
            shared=task.shared, start=lambda: started(task, site, rank, scaling, generator, source or {}),
        )  # fmt: skip
        try:
            made = ADAPTERS.for_options(options.method)(place, options.method)
        except LrcError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise SiteError(site.fqn, message=f"`method: {options.method.type}` failed: {error}") from error
        if isinstance(made, Keep):
            return made, None
        assert isinstance(made, LinearMap), "a method returns a map"
        return Rewrite(made, tuple(place.notes)), remembered(place, options, alpha)


@dataclass(frozen=True)
class Work:
    """What all sites of one call have in common."""

    program: Program
    session: Session
    options: Adapt
    shared: dict[str, Any]
    planning: bool


def started(task: Work, site: Site, rank: int, scaling: float, generator: torch.Generator, source: dict[str, Any]) -> Initial:
    """Run the initialiser for one site; while planning, return factors that have sizes and no numbers."""
    options = task.options.start
    if options is None:
        raise SiteError(site.fqn, message=f"`method: {task.options.method.type}` has no initialiser")
    if task.planning:
        with torch.device("meta"):
            return Initial(torch.empty(site.out_features, rank), torch.empty(rank, site.in_features))

    def weight() -> torch.Tensor:
        made = site.map.dense().weight
        return made.to(torch.promote_types(made.dtype, torch.float32), copy=True)

    start = Start(weight, site.shape, rank, scaling, site.kind, generator, **source)  # type: ignore[arg-type]  # one of three words
    found: Initial = INITIALISERS.for_options(options)(start, options)
    return found


def settled(program: Program, session: Session, options: Adapt, wanted: dict[str, int]) -> Mapping[str, int]:
    """Return the ranks as the initialiser shares them out, 0 for no adapter."""
    start = options.start
    if start is None or type(start).ranks is InitialiserOptions.ranks or not wanted:
        return wanted
    return start.ranks(wanted, findings(program, session, start, wanted).__getitem__)


def alpha_for(site: Site, rank: int, options: Adapt) -> float | None:
    """Return a site's alpha; where the initialiser gave it another rank than the spec's, it changes by as much."""
    alpha, wanted = options.alpha_of(site.fqn), asked(site, rank, options)
    return alpha if alpha is None or rank == wanted else alpha * rank / wanted


def asked(site: Site, rank: int | None, options: Adapt) -> int:
    """Return the rank that the spec asks for; where that depends on other sites, the one that was decided."""
    if options.rank is None or options.rank.by_shape:
        return options.rank_of(site.fqn, site.shape)
    assert rank is not None, "an adapter that is not kept has a rank"
    return rank


def refused(site: Site, choice: Choice, options: Adapt) -> str | None:
    """Return why a site gets no adapter, or None."""
    return choice.reason if choice.rank is None else obstacle(site, choice.rank, options)


def obstacle(site: Site, rank: int, options: Adapt) -> str | None:
    """Return why a site cannot be adapted, or None."""
    found = options.method.obstacle(site, rank)
    if found is None and options.start is not None:
        found = options.start.obstacle(site.kind, site.shape, rank)
    return found


def remembered(place: Place, options: Adapt, alpha: float | None) -> Adapted | None:
    """Return what is remembered of an adapter that is no longer only planned."""
    if place.planning:
        return None
    initial, start = place.initial, options.start
    factors = (initial.B.clone(), initial.A.clone()) if initial is not None and initial.subtracted else None
    return Adapted(
        options.method.type, place.rank, alpha, place.scaling,
        init=None if initial is None or start is None else start.type,
        dropout=place.dropout, initial=factors, options=place.shared["options"],
    )  # fmt: skip


def check_patterns(options: Adapt, fqns: list[str], where: str) -> None:
    """Raise UsageError for a key of `rank_pattern` or `alpha_pattern` that matches no selected site."""
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in () if options.optional else getattr(options, name):
            if not any(matching({pattern: 0}, fqn) for fqn in fqns):
                raise UsageError(
                    where, message=f"`{name}`: {pattern!r} matches no selected site",
                    hint="Mend the pattern, or set `optional: true`",
                )  # fmt: skip
