"""Moments in the cache: one entry a site for its gradients, one for every input that several sites may share."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lrc.measure.cache import Cache, digest
from lrc.measure.second_moments import pack_symmetric, unpack_symmetric
from lrc.program import Program, Site
from lrc.solvers import Moments


def store_moments(cache: Cache, key: str, program: Program, moments: Mapping[str, Moments]) -> None:
    """Store moments; the entry of a site last, since it says that all of it is there."""
    stored: set[str] = set()
    for fqn, found in moments.items():
        shared = _input_key(key, program, fqn)
        if shared not in stored:
            stored.add(shared)
            assert found.gram is not None
            assert found.mean is not None
            rows = torch.tensor([found.tokens])
            cache.put(shared, {"gram": _packed(found.gram), "mean": found.mean, "tokens": rows})
        own = {name: _packed(value) for name in ("fisher", "weighted_gram") if (value := getattr(found, name)) is not None}
        if found.weighted_mean is not None:
            own["weighted_mean"] = found.weighted_mean
        cache.put(_site_key(key, fqn), own | {"there": torch.ones(1)})


def load_moments(cache: Cache, key: str, program: Program, fqns: Iterable[str]) -> dict[str, Moments]:
    """Return the moments that are stored; sites with the same inputs get the same tensors."""
    shared: dict[str, tuple[Tensor, Tensor, int]] = {}
    found = {}
    for fqn in fqns:
        own = cache.get(_site_key(key, fqn))
        name = _input_key(key, program, fqn)
        if own is not None and name not in shared:
            entry = cache.get(name)
            if entry is not None:
                features = entry["mean"].shape[0]
                gram = _unpacked(program.sites[fqn], "gram", entry["gram"], features)
                shared[name] = gram, entry["mean"], int(entry["tokens"])
        if own is None or name not in shared:
            continue
        gram, mean, tokens = shared[name]
        site = program.sites[fqn]
        sizes = {"fisher": site.out_features, "weighted_gram": site.in_features}
        unpacked = {name: _unpacked(site, name, own[name], size) for name, size in sizes.items() if name in own}
        found[fqn] = Moments(gram=gram, mean=mean, tokens=tokens, weighted_mean=own.get("weighted_mean"), **unpacked)
    return found


def _packed(moment: Tensor) -> Tensor:
    """Return what is stored of a second moment: its upper triangle, or its diagonal where it has nothing else."""
    return moment if moment.ndim == 1 else pack_symmetric(moment)


def _unpacked(site: Site, name: str, packed: Tensor, features: int) -> Tensor:
    return packed if site.kind == "embedding" and name != "fisher" else unpack_symmetric(packed, features)


def _site_key(key: str, fqn: str) -> str:
    return f"{digest(key, 'site', fqn)}-moments"


def _input_key(key: str, program: Program, fqn: str) -> str:
    site = program.site(fqn)
    reads = sorted({use.input for use in site.uses})
    layout = () if site.kind == "linear" else (repr(site.layout),)
    return f"{digest(key, 'input', reads, *layout)}-inputs"
