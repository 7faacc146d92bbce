"""Moments in the cache: what each need measures is an entry of its own, found by whatever asks for it, with others or alone.

Those of the inputs are one entry for every input that several sites may share, those of gradients one a site.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.measure.cache import Cache, digest
from lrc.measure.second_moments import pack_symmetric, unpack_symmetric
from lrc.program import Program, Site
from lrc.solvers import Moments, Need

PARTS = {
    Need.INPUTS: ("gram", "mean"),
    Need.GRADIENTS: ("fisher", "weighted_gram", "weighted_mean"),
    Need.WEIGHT_FISHER: ("weight_fisher",),
    Need.MAGNITUDES: ("magnitudes",),
}
SHARED = (Need.INPUTS, Need.MAGNITUDES)  # of the inputs, whatever the site
SYMMETRIC = ("gram", "fisher", "weighted_gram")


class StoredMoments:
    """Moments of one program on one set of data.

    key: a digest of both. gradients: of what the statistics of gradients depend on beside them (`fisher`, `draws`, the seed).
    """

    def __init__(self, cache: Cache, key: str, gradients: str, program: Program, needs: frozenset[Need]) -> None:
        self.cache = cache
        self.key = key
        self.gradients = gradients
        self.program = program
        self.needs = sorted(needs)

    def store(self, moments: Mapping[str, Moments]) -> None:
        """Store moments; those that several sites share once."""
        stored: set[str] = set()
        for fqn, found in moments.items():
            for need in self.needs:
                entry = self._entry(need, fqn)
                if entry not in stored:
                    stored.add(entry)
                    self.cache.put(entry, _packed(found, need) | {"tokens": torch.tensor([found.tokens])})

    def load(self, fqns: Iterable[str]) -> dict[str, Moments]:
        """Return the moments of which all that is needed is stored; sites with the same inputs get the same tensors."""
        shared: dict[str, dict[str, Any]] = {}
        found = {}
        for fqn in fqns:
            site, parts = self.program.site(fqn), dict[str, Any]()
            entries = [self._entry(need, fqn) for need in self.needs]
            if not all(entry in self.cache for entry in entries):
                continue
            for need, entry in zip(self.needs, entries, strict=True):
                read = shared.get(entry)
                if read is None:
                    tensors = self.cache.get(entry)
                    if tensors is None:
                        break
                    read = _unpacked(tensors, need, site) | {"tokens": int(tensors["tokens"])}
                if need in SHARED:
                    shared[entry] = read
                parts |= read
            else:
                found[fqn] = Moments(**parts)
        return found

    def _entry(self, need: Need, fqn: str) -> str:
        """Return the name of an entry. The moments of a joint weight are no sum of parts: all its needs are in its name."""
        site = self.program.site(fqn)
        backward = need in (Need.GRADIENTS, Need.WEIGHT_FISHER) or site.joint
        about: list[object] = [self.key, need, self.gradients if backward else "", self.needs if site.joint else ()]
        if need not in SHARED:
            return f"{digest(*about, fqn)}-moments"
        reads = sorted({f"{use.input} {use.context}" if use.context else use.input for use in site.uses})
        layout = () if site.kind == "linear" and not site.joint else (repr(site.layout),)
        return f"{digest(*about, reads, *layout)}-inputs"


def _packed(moments: Moments, need: Need) -> dict[str, Tensor]:
    """Return those of the statistics of a need that there are, as they are stored."""
    given = {name: value for name in PARTS[need] if (value := getattr(moments, name)) is not None}
    return {name: pack_symmetric(value) if value.ndim == 2 and name in SYMMETRIC else value for name, value in given.items()}


def _unpacked(entry: Mapping[str, Tensor], need: Need, site: Site) -> dict[str, Any]:
    """Return the statistics of an entry, as `_packed` was given them."""
    made: dict[str, Any] = {}
    for name in PARTS[need]:
        if name in entry:
            features = site.out_features if name == "fisher" else site.in_features
            apart = site.layout.looked_up or site.layout.groups > 1  # counts; groups have one matrix each
            packed = name in SYMMETRIC and not (site.joint or site.kind == "experts" if name == "fisher" else apart)
            made[name] = unpack_symmetric(entry[name], features) if packed else entry[name]
    return made
