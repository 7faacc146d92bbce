"""What initialisers want to know of every site: moments, gradients, and what observers find in the inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrc.errors import UsageError
from lrc.initialisers import InitialiserOptions, Observer
from lrc.measure import digest
from lrc.measure.gradients import in_memory, mean_gradients, settled_loss
from lrc.measure.observe import observe
from lrc.program import Program
from lrc.run import Session
from lrc.solvers import Moments

ROUNDS = 10  # how often the calibration data is run for an observer that has not seen enough
Source = Callable[[str], dict[str, Any]]


def sources(
    program: Program, session: Session, start: InitialiserOptions | None, wanted: Mapping[str, int], most: int
) -> Source:
    """Return a function from a site to the keyword arguments of `Start` that were measured for it.

    wanted: the ranks that the spec asks for, by site. most: bytes of gradients that are held at a time.
    """
    if start is None or not wanted:
        return lambda fqn: {}
    moments = session.moments(program, list(wanted), start.needs) if start.needs else None
    observed = findings(program, session, start, wanted)
    gradients = Gradients(program, session, list(wanted), most) if start.gradients else None

    def of(fqn: str) -> dict[str, Any]:
        return {
            "moments": Moments() if moments is None else moments(fqn),
            "observed": observed.get(fqn),
            "gradient": None if gradients is None else gradients(fqn),
        }

    return of


def findings(program: Program, session: Session, start: InitialiserOptions, wanted: Mapping[str, int]) -> Mapping[str, Any]:
    """Return what the initialiser's observers found, by site; none where it has no observer. Measured once in a session."""
    made = {fqn: start.observer(program.sites[fqn].in_features, rank) for fqn, rank in wanted.items()}
    observers = {fqn: observer for fqn, observer in made.items() if observer is not None}
    if not observers:
        return {}
    need_data(session, start)
    key = digest("observed", program.digest(), list(session.batches), start.model_dump(), dict(wanted))
    if key not in session.memo:
        shared = shared_by_input(program, observers, wanted)
        observe(program, session.batches, shared, rounds=ROUNDS)
        session.memo[key] = {fqn: observer.found() for fqn, observer in shared.items()}
    found: Mapping[str, Any] = session.memo[key]
    return found


def shared_by_input(program: Program, observers: Mapping[str, Observer], wanted: Mapping[str, int]) -> dict[str, Observer]:
    """Return the observers, one for all sites that read the same value in the same way and want the same rank."""
    first: dict[Any, Observer] = {}
    shared = {}
    for fqn, observer in observers.items():
        site = program.sites[fqn]
        key = (tuple(use.reads for use in site.uses), site.kind == "linear" or site.layout, wanted[fqn])
        shared[fqn] = first.setdefault(key, observer)
    return shared


class Gradients:
    """The mean gradient of every site, measured for as many sites at a time as memory allows, when one of them is asked for."""

    def __init__(self, program: Program, session: Session, fqns: Sequence[str], most: int) -> None:
        self.program = program.clone()  # as it was: adapters are put in place while later sites are still to be measured
        self.session = session
        self.groups = list(in_memory(program, fqns, most))
        self.held: dict[str, Any] = {}

    def __call__(self, fqn: str) -> Any:
        """Return dL/dW of a site."""
        if fqn not in self.held:
            (group,) = (group for group in self.groups if fqn in group)
            self.held = {}
            batches = self.session.batches
            loss = settled_loss("auto", self.program.task, next(iter(batches)))
            self.held = mean_gradients(self.program, batches, group, loss=loss, seed=self.session.seed)
        return self.held.pop(fqn)


def need_data(session: Session, start: InitialiserOptions) -> None:
    """Raise UsageError where the spec names no calibration data."""
    if not session.has_data:
        raise UsageError(
            "calibration", message=f"`init: {start.type}` looks at calibration data, and there is none",
            hint="Name a `calibration.dataset`",
        )  # fmt: skip
