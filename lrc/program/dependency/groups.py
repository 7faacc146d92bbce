"""Units that can be cut, and the groups that they form: channels of linked convolutions, features of an MLP, heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lrc.program.dependency import moves, sums
from lrc.program.dependency.flow import Flow, erase_unread
from lrc.program.dependency.labels import FIXED, Array, Ledger, Slot
from lrc.program.program import Program

ROUNDS = 8  # of tying what a view would take apart
RULES_OF = (moves, sums)  # imported for their rules


@dataclass(frozen=True)
class Member:
    """What one stored dimension loses with a unit.

    slot: (`site`, name, `out` or `in`) for rows or columns of a map, of a convolution channels; (`tensor`, name, dimension).
    index: (units, indices a unit), int64, rising in every row.
    """

    slot: Slot
    index: Array

    @property
    def site(self) -> str | None:
        """The site, or None for a tensor outside of maps."""
        return self.slot[1] if self.slot[0] == "site" else None


@dataclass(frozen=True)
class Group:
    """Units that are alike: each takes as much from the same places.

    name: the first site that gives them, numbered where it gives several. kind: `heads`, `channels` or `features`.
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose maps get smaller, in the order of the members."""
        return tuple(dict.fromkeys(member.site for member in self.members if member.site is not None))


@dataclass(frozen=True)
class Groups:
    """The groups of a program in graph order, and why what a site gives cannot be cut, by site.

    flow: how labels went through the graph; unit_of: the unit (a number) of every label, FIXED for none.
    """

    groups: tuple[Group, ...]
    reasons: Mapping[str, str]
    flow: Flow
    unit_of: Array

    def labels(self, group: Group, units: Array) -> Array:
        """Return the labels that go with some units of a group."""
        member = group.members[0]
        found: Array = self.unit_of[self.flow.ledger.slots[member.slot][member.index[units, 0]]]
        return found


def find_groups(program: Program) -> Groups:
    """Return what can be cut from a program, which is not changed."""
    twin = program.clone()
    erase_unread(twin)
    nodes = set(twin.nodes)
    for fqn, site in twin.sites.items():  # recurrent layers are one operator, whose weights have no nodes
        if fqn not in twin.maps and all(use.node in nodes for use in site.uses):
            twin.replace(fqn, site.map, settle=False)
    twin.__dict__.pop("nodes", None)
    flow = Flow(twin)
    flow.run()
    unit_of = settled(flow.ledger)
    groups = _grouped(program, flow.ledger, unit_of)
    return Groups(tuple(groups), _reasons(flow.ledger, unit_of), flow, unit_of)


def settled(ledger: Ledger) -> Array:
    """Return the unit of every label, so that every view of what is left is one again.

    Along several dimensions, those after the first along which units differ must not matter: an index of a head goes with it.
    """
    for _ in range(ROUNDS):
        unit_of = _components(ledger)
        changed = False
        for labels in ledger.joints:
            found = unit_of[labels]
            differ = [axis for axis in range(found.ndim) if (found != found.take([0], axis)).any()]
            for axis in differ[1:]:
                ledger.tie(labels, labels.take([0], axis))
                changed = True
        if not changed:
            return unit_of
    for labels in ledger.joints:
        ledger.fix(labels, "views of it contradict each other")
    return _components(ledger)


def _components(ledger: Ledger, *, fixed: bool = True) -> Array:
    """Return for every label the smallest one that is cut with it; FIXED, where that is asked for, if it cannot be cut."""
    left = np.concatenate([pair[0] for pair in ledger.pairs] or [np.zeros(0, np.int64)])
    right = np.concatenate([pair[1] for pair in ledger.pairs] or [np.zeros(0, np.int64)])
    if not fixed:
        free = (left != FIXED) & (right != FIXED)
        left, right = left[free], right[free]
    matrix = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(ledger.count, ledger.count))
    _, number = connected_components(matrix, directed=False)
    _, first, inverse = np.unique(number, return_index=True, return_inverse=True)
    found: Array = first[inverse].astype(np.int64)
    return found


def _grouped(program: Program, ledger: Ledger, unit_of: Array) -> list[Group]:
    """Return the groups: units that take as much from the same slots."""
    takes: dict[int, list[tuple[Slot, int]]] = {}
    stored = {slot: labels for slot, labels in ledger.slots.items() if slot[0] != "value"}
    where: dict[Slot, dict[int, list[int]]] = {}
    for slot, labels in stored.items():
        places: dict[int, list[int]] = {}
        for place, unit in enumerate(unit_of[labels].tolist()):
            if unit != FIXED:
                places.setdefault(unit, []).append(place)
        where[slot] = places
        for unit, mine in places.items():
            takes.setdefault(unit, []).append((slot, len(mine)))
    alike: dict[tuple[Any, ...], list[int]] = {}
    for unit, taken in takes.items():
        if any(slot[0] == "site" and slot[2] == "out" for slot, _ in taken):
            alike.setdefault(tuple(taken), []).append(unit)
    heads = set(unit_of[np.concatenate([labels.ravel() for labels in ledger.heads])].tolist()) if ledger.heads else set()
    groups: list[Group] = []
    for key, units in alike.items():
        signature: list[tuple[Slot, int]] = list(key)
        members = tuple(Member(slot, np.array([where[slot][unit] for unit in units], np.int64)) for slot, _ in signature)
        writer = next(slot[1] for slot, _ in signature if slot[0] == "site" and slot[2] == "out")
        conv = any(slot[0] == "site" and program.sites[slot[1]].kind == "conv" for slot, _ in signature)
        kind = "heads" if units[0] in heads else "channels" if conv else "features"
        named = sum(group.name.partition("#")[0] == writer for group in groups)
        groups.append(Group(f"{writer}#{named + 1}" if named else writer, kind, len(units), members))
    return groups


def _reasons(ledger: Ledger, unit_of: Array) -> dict[str, str]:
    """Return why nothing of what a site gives can be cut, by site: of what was found for all that is tied to it, the first."""
    wanted = {slot[1]: labels for slot, labels in ledger.slots.items() if slot[0] == "site" and slot[2] == "out"}
    fixed = {fqn: int(labels[0]) for fqn, labels in wanted.items() if len(labels) and (unit_of[labels] == FIXED).all()}
    without = _components(ledger, fixed=False)
    found: dict[int, str] = {}
    for labels, reason, _ in sorted(ledger.reasons, key=lambda given: given[2]):
        for unit in np.unique(without[labels]).tolist():
            found.setdefault(unit, reason)
    return {fqn: found.get(int(without[label]), "it is tied to what cannot be cut") for fqn, label in fixed.items()}
