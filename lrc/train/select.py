"""Which parameters are trained: what passes put in place, all of them, and what is named."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from lrc.errors import UsageError
from lrc.program import Program
from lrc.spec.patterns import Candidate, select
from lrc.train.optim import Trained

Which = Literal["inserted", "factors", "adapters", "all"]


def trained_names(program: Program, fqns: Collection[str], which: Which, also: Sequence[str], where: str) -> list[str]:
    """Return the names of the parameters that are trained, in the order of the graph's tensors.

    inserted: what the maps at the sites `fqns` leave trainable; factors, adapters: the same of maps that `adapt` did not, or
    did make; all: every floating parameter of the model. also: patterns of further parameters by name. Raises UsageError
    when a pattern matches nothing, and when nothing is left to train.
    """
    tensors = {n: t for n, t in program.tensors().items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
    chosen = set(tensors) if which == "all" else set().union(*(_of_map(program, fqn, which) for fqn in fqns))
    if also:
        found = select([Candidate(name, "Parameter") for name in tensors], also, [])
        if found.unmatched:
            raise UsageError(
                where, message=f"`also: {found.unmatched[0]}` matches no parameter",
                hint=f"There are {', '.join(list(tensors)[-3:])} and others",
            )  # fmt: skip
        chosen |= set(found.rules)
    names = [name for name in tensors if name in chosen]
    if not names:
        raise UsageError(
            where, message=f"nothing is left to train: `parameters: {which}` selects no parameter",
            hint="Put `factorize` or `adapt` before this pass, widen `targets`, or set `parameters: all`",
        )  # fmt: skip
    return names


def _of_map(program: Program, fqn: str, which: Which) -> set[str]:
    """Return the names of the parameters that the map at a site leaves trainable; a site that no pass touched has none."""
    adapter = fqn in program.adapters
    if fqn not in program.maps or (which == "adapters" and not adapter) or (which == "factors" and adapter):
        return set()
    return {
        f"{module}.{name}"
        for module, made in program.placed(fqn).items()
        for name, p in made.named_parameters()
        if p.is_floating_point() and (p.requires_grad or (name == "bias" and not adapter and not program.frozen))
    }


def as_trained(
    parameters: Mapping[str, Tensor], gates: Collection[str] = (), lr_factors: Mapping[str, float] | None = None
) -> Trained:
    """Return what an optimizer is given: parameters with their gates and their pairs of factors.

    lr_factors: pattern of names -> factor of the learning rate; the last one that matches counts. Raises UsageError for a
    pattern that matches none.
    """
    factors = lr_factors or {}
    found = select([Candidate(name, "Parameter") for name in parameters], list(factors))
    if found.unmatched:
        raise UsageError(
            "train.lr_factors", message=f"`{found.unmatched[0]}` matches no trained parameter",
            hint=f"There are {', '.join(list(parameters)[-3:])} and others",
        )  # fmt: skip
    pairs = []
    for name, A in parameters.items():
        B = parameters.get(f"{name[:-1]}B") if name.endswith(".A") else None
        if B is not None and A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]:
            pairs.append((name, f"{name[:-1]}B"))
    return Trained(parameters, frozenset(gates), tuple(pairs), {name: factors[rule] for name, rule in found.rules.items()})
