"""Moments in the cache: one entry a site for its gradients, one for every input that several sites may share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrc.measure.cache import Cache, digest
from lrc.measure.second_moments import pack_symmetric, unpack_symmetric
from lrc.program import Program, Site
from lrc.solvers import Moments

SHARED = ("gram", "mean", "magnitudes")  # of the inputs, whatever the site
OWN = ("fisher", "weighted_gram", "weighted_mean", "weight_fisher")
SYMMETRIC = ("gram", "fisher", "weighted_gram")


def store_moments(cache: Cache, key: str, program: Program, moments: Mapping[str, Moments]) -> None:
    """Store moments; the entry of a site last, since it says that all of it is there."""
    stored: set[str] = set()
    for fqn, found in moments.items():
        shared = _input_key(key, program, fqn)
        if shared not in stored:
            stored.add(shared)
            cache.put(shared, _packed(found, SHARED) | {"tokens": torch.tensor([found.tokens])})
        cache.put(_site_key(key, fqn), _packed(found, OWN) | {"there": torch.ones(1)})


def load_moments(cache: Cache, key: str, program: Program, fqns: Iterable[str]) -> dict[str, Moments]:
    """Return the moments that are stored; sites with the same inputs get the same tensors."""
    shared: dict[str, dict[str, Any]] = {}
    found = {}
    for fqn in fqns:
        own = cache.get(_site_key(key, fqn))
        name, site = _input_key(key, program, fqn), program.site(fqn)
        if own is None:
            continue
        if name not in shared:
            entry = cache.get(name)
            if entry is None:
                continue
            shared[name] = _unpacked(entry, SHARED, site) | {"tokens": int(entry["tokens"])}
        found[fqn] = Moments(**shared[name], **_unpacked(own, OWN, site))
    return found


def _packed(moments: Moments, names: Sequence[str]) -> dict[str, Tensor]:
    """Return those of the named statistics that were measured, as they are stored."""
    given = {name: value for name in names if (value := getattr(moments, name)) is not None}
    return {name: pack_symmetric(value) if value.ndim == 2 and name in SYMMETRIC else value for name, value in given.items()}


def _unpacked(entry: Mapping[str, Tensor], names: Sequence[str], site: Site) -> dict[str, Any]:
    """Return the named statistics of an entry, as `_packed` was given them."""
    made: dict[str, Any] = {}
    for name in names:
        if name in entry:
            features = site.out_features if name == "fisher" else site.in_features
            apart = site.layout.looked_up or site.layout.groups > 1  # counts; groups have one matrix each
            packed = name in SYMMETRIC and not (site.joint or site.kind == "experts" if name == "fisher" else apart)
            made[name] = unpack_symmetric(entry[name], features) if packed else entry[name]
    return made


def _site_key(key: str, fqn: str) -> str:
    return f"{digest(key, 'site', fqn)}-moments"


def _input_key(key: str, program: Program, fqn: str) -> str:
    site = program.site(fqn)
    reads = sorted({f"{use.input} {use.context}" if use.context else use.input for use in site.uses})
    layout = () if site.kind == "linear" and not site.joint else (repr(site.layout),)
    return f"{digest(key, 'input', reads, *layout)}-inputs"
