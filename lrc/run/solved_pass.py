"""How a function from one site to a map becomes a pass when making the map takes long: solved in parallel, stored on disk.

Planning makes every map to say what it costs; applying reads it again. A killed run goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lrc.errors import LrcError, SiteError
from lrc.maps import LinearMap, restore
from lrc.measure import digest
from lrc.program import Program, Site
from lrc.run.passes import PassOptions, ProgramPass, Rewrite, Statistics, needs_of
from lrc.run.plan import Decision, Keep
from lrc.run.selection import select_sites
from lrc.run.session import Session
from lrc.run.site_pass import carried_out, put
from lrc.run.statistics import generator_for, solve_all
from lrc.run.summary import summarize
from lrc.spec.registry import PASSES, Rule

T = TypeVar("T")
Made = Rewrite | Keep
SolveFunction = Callable[[Site, Statistics, Any, torch.Generator], Made]
Choose = Callable[[Program, Session, Any, Sequence[str], "SolvedPass"], Mapping[str, Any]]


def one_for_all(program: Program, session: Session, options: Any, fqns: Sequence[str], made_by: "SolvedPass") -> dict[str, Any]:
    """Return the pass's own options for every site."""
    return dict.fromkeys(fqns, options)


def solved_pass(options: type[PassOptions], choose: Choose = one_for_all) -> Callable[[SolveFunction], Rule[[], ProgramPass]]:
    """Make a pass of a pure function `(site, statistics, options, generator)` that returns `Rewrite` or `Keep`.

    choose: gives every site its own options, where a budget over all of them decides that; pure, and called again by
    `apply`. The result depends on nothing but the site's map, its statistics, the options and the seed. Registers nothing.
    """

    def decorate(function: SolveFunction) -> Rule[[], ProgramPass]:
        made: ProgramPass = SolvedPass(function, choose)
        return Rule(PASSES.rule(options)(function).name, options, lambda: made)

    return decorate


class SolvedPass:
    """A pass made of a slow function from one site to a map."""

    def __init__(self, function: SolveFunction, choose: Choose) -> None:
        self.function = function
        self.choose = choose

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Make the map of every selected site, and look at it."""
        selected = select_sites(program, session, options, index)
        made = self.made(program, session, options, [s.fqn for s in selected if not s.keep])
        decisions = []
        for choice in selected:
            before = summarize(program.sites[choice.fqn].map)
            decision = Decision(index, options.type, (choice.fqn,), choice.rule, before, before)
            decisions.append(carried_out(decision, Keep(choice.keep) if choice.keep else made[choice.fqn]))
        return decisions

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Put the stored maps in place; what the cache lost is made again."""
        work = {d.sites[0]: d for d in decisions if d.keep is None}
        made = self.made(program, session, options, list(work))
        done = [put(program, replace(d, notes=()), made[d.sites[0]]) if d.sites[0] in work else d for d in decisions]
        program.settle()
        return done

    def made(self, program: Program, session: Session, options: Any, fqns: Sequence[str]) -> dict[str, Made]:
        """Return the result for every site, from the cache where it is there."""
        return self.made_with(program, session, self.choose(program, session, options, fqns, self) if fqns else {})

    def made_with(self, program: Program, session: Session, chosen: Mapping[str, Any]) -> dict[str, Made]:
        """Return the result for every site with options of its own."""

        def find(key: str, fqn: str) -> Made | None:
            return unpacked(session, key, program.sites[fqn])

        return self.stored(program, session, chosen, "map", self.function, find, lambda key, made: packed(session, key, made))

    def measured_with(
        self, program: Program, session: Session, chosen: Mapping[str, Any], measure: Callable[..., float]
    ) -> dict[str, float]:
        """Return one number for every site: what `measure` gives for the arguments of the pass's function."""

        def find(key: str, fqn: str) -> float | None:
            tensors = session.cache.get(key)
            return None if tensors is None else float(tensors["value"])

        def keep(key: str, value: float) -> None:
            session.cache.put(key, {"value": torch.tensor(value, dtype=torch.float64)})

        return self.stored(program, session, chosen, measure.__name__, measure, find, keep)

    def stored(
        self,
        program: Program,
        session: Session,
        chosen: Mapping[str, Any],
        kind: str,
        function: Callable[..., T],
        find: Callable[[str, str], T | None],
        keep: Callable[[str, T], None],
    ) -> dict[str, T]:
        """Return what `function` gives for every site, computed in parallel where the cache lacks it.

        The statistics are those that the options of the first site need: options differ between sites in other things.
        """
        if not chosen:
            return {}
        options = next(iter(chosen.values()))
        needs, solver = needs_of(options), getattr(options, "solver", None)
        measured = session.measured_key(program, needs, solver)
        keys = {fqn: solved_key(kind, program.sites[fqn], measured, own, session.seed) for fqn, own in chosen.items()}
        found = {fqn: made for fqn, key in keys.items() if (made := find(key, fqn)) is not None}
        missing = [fqn for fqn in keys if fqn not in found]
        moments = session.moments(program, missing, needs, solver)
        if missing:
            moments(missing[0])

        def solve(fqn: str) -> tuple[str, T]:
            generator = generator_for(fqn, session.seed)
            made = self.call(function, program.sites[fqn], Statistics(moments(fqn)), chosen[fqn], generator)
            keep(keys[fqn], made)
            return fqn, made

        found.update(session.track(options.type, solve_all(missing, solve, session.workers), len(missing)))
        return {fqn: found[fqn] for fqn in keys}

    def call(
        self, function: Callable[..., T], site: Site, statistics: Statistics, options: Any, generator: torch.Generator
    ) -> T:
        """Call the function; an error that it raises names the site and the pass."""
        try:
            return function(site, statistics, options, generator)
        except LrcError as error:
            raise SiteError(f"{site.fqn}: {error.where}", expected=error.expected, got=error.got, hint=error.hint,
                            message=error.message) from error  # fmt: skip
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise SiteError(site.fqn, message=f"pass `{options.type}` failed: {error}") from error


def solved_key(kind: str, site: Site, measured: str, options: PassOptions, seed: int) -> str:
    """Return the content hash of everything that a result depends on."""
    state = {name: tensor for name, tensor in site.map.state_dict().items() if isinstance(tensor, torch.Tensor)}
    about = options.model_dump(exclude={"targets", "ignore", "optional"})
    return digest(f"{kind}-2", site.map.structure(), state, measured, about, seed, torch.__version__, site.fqn)


def packed(session: Session, key: str, made: Made) -> None:
    """Store a result."""
    if isinstance(made, Keep):
        words: dict[str, Any] = {"keep": made.reason}
        tensors: dict[str, torch.Tensor] = {}
    else:
        words = {"map": made.map.structure(), "notes": list(made.notes), "rank": made.rank}
        tensors = {f"map.{name}": tensor for name, tensor in made.map.state_dict().items()}
    tensors["words"] = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
    session.cache.put(key, tensors)


def unpacked(session: Session, key: str, site: Site) -> Made | None:
    """Return a stored result, or None."""
    tensors = session.cache.get(key)
    if tensors is None:
        return None
    words = json.loads(bytes(tensors.pop("words").tolist()))
    if "keep" in words:
        return Keep(words["keep"])
    made: LinearMap = restore(words["map"]).to(site.dtype)
    made.load_state_dict({name.removeprefix("map."): tensor for name, tensor in tensors.items()})
    return Rewrite(made, tuple(words["notes"]), words["rank"])
