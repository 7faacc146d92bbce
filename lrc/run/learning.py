"""`allocate: learned`: a budget shared by training where every layer's truncation stands."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrc.measure import digest
from lrc.measure.truncation import Problem, learn
from lrc.program import Program
from lrc.ranks import AllocatorOptions, Auto, Budget, Candidates, LearnedAllocation, Search
from lrc.run.session import Session
from lrc.run.statistics import Terms
from lrc.solvers import Decomposition
from lrc.spec.registry import ALLOCATORS


def allocator(options: Any) -> tuple[AllocatorOptions, LearnedAllocation | None]:
    """Return who shares a pass's budget, and how it is learned from there, if it is."""
    asked: Any = options.allocate
    if isinstance(asked, Auto) and options.solver.shares:
        asked = ALLOCATORS.get(options.solver.shares).options()
    return (Auto(), asked) if isinstance(asked, LearnedAllocation) else (asked, None)


def learning(program: Program, session: Session, options: Any, terms: Terms, how: LearnedAllocation | None) -> Search | None:
    """Return what learns every site's place, starting at the places of another allocator; None where nothing is learned."""
    if how is None:
        return None

    def search(sites: Sequence[Candidates], budget: Budget, start: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
        free = [place for place, site in enumerate(sites) if site.ranks]
        if not free or budget.amount >= sum(float(site.costs[-1]) for site in sites):
            return list(start), ("learned allocation: there is nothing to choose, the budget takes everything as it is",)
        stay = sum(float(site.costs[-1]) for site in sites if not site.ranks)
        chosen = [sites[place] for place in free]
        decomposed = {site.name: whole(session, program, terms, site.name, options) for site in chosen}
        problem = Problem(
            program, decomposed, chosen, Budget(budget.amount - stay, budget.share), [start[place] for place in free],
            session.batches, how, session.seed, key_of(program, session, terms, chosen, budget, start, how),
        )  # fmt: skip
        found = learn(problem, session.cache, lambda done, total: session.progress("learn ranks", done, total))
        places = list(start)
        for place, new in zip(free, found.places, strict=True):
            places[place] = new
        held = "better" if found.after < found.before else "no better, so the start is kept"
        note = f"learned allocation: loss {found.before:.4g} → {found.after:.4g} after {how.steps} steps, on data held back"
        return places, (f"{note} ({held})",)

    return search


def whole(session: Session, program: Program, terms: Terms, fqn: str, options: Any) -> Decomposition:
    """Return a decomposition with its factors, computed again where the cache lost them."""
    found = terms.full(fqn)
    if found is None:
        moments = session.moments(program, [fqn], options.solver.needs, options.solver)
        terms.store(program.sites[fqn], session.solve(program.sites[fqn], moments(fqn), options))
        found = terms.full(fqn)
    assert found is not None, "the cache has just taken it"
    return found


def key_of(
    program: Program, session: Session, terms: Terms, sites: Sequence[Candidates], budget: Budget, start: Sequence[int],
    how: LearnedAllocation,
) -> str:  # fmt: skip
    """Return the content hash of everything that a training depends on."""
    offers: Mapping[str, Any] = {site.name: (terms.key(site.name), list(site.ranks), site.costs) for site in sites}
    return digest(
        "learned-1", program.digest(), list(session.batches), offers, budget.amount, list(start), how, session.seed,
        torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
