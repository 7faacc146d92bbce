"""Decompositions on disk: computed once for a weight, its statistics and a solver; every rank and budget reads them again."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrc.measure import Cache, digest
from lrc.program import Site
from lrc.ranks import Form, SiteCurve
from lrc.solvers import LOSS_UNIT, Decomposition, Moments

T = TypeVar("T")

OPTIONAL = ("bias", "mean", "target")


def pack(terms: Decomposition) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a decomposition into what planning reads (small) and what applying reads (the factors)."""
    words = json.dumps([terms.remainder, terms.scale, terms.unit, list(terms.notes)]).encode()
    small = {"S": terms.S, "words": torch.frombuffer(bytearray(words), dtype=torch.uint8)}
    small |= {name: value for name in OPTIONAL if (value := getattr(terms, name)) is not None}
    return small, {"B": terms.B, "A": terms.A}


def unpack(small: dict[str, Tensor], factors: dict[str, Tensor] | None = None) -> Decomposition:
    """Put together what `pack` split; without the factors, B and A are empty and only the spectrum is of use."""
    remainder, scale, unit, notes = json.loads(bytes(small["words"].tolist()))
    nothing = small["S"].new_empty(0)
    factors = factors or {"B": nothing, "A": nothing}
    optional = {name: small.get(name) for name in OPTIONAL}
    return Decomposition(factors["B"], factors["A"], small["S"], remainder, scale, unit, notes=tuple(notes), **optional)


class Terms:
    """The decompositions of one pass, by site."""

    def __init__(self, cache: Cache, keys: dict[str, str]) -> None:
        self._cache = cache
        self._keys = keys
        self._spectra: dict[str, Decomposition] = {}

    def key(self, fqn: str) -> str:
        """Return the content hash that a decomposition is stored under."""
        return self._keys[fqn]

    def missing(self) -> list[str]:
        """Return the sites whose decomposition is not stored yet."""
        for fqn, key in self._keys.items():
            small = None if fqn in self._spectra else self._cache.get(f"{key}-spectrum")
            if small is not None:
                self._spectra[fqn] = unpack(small)
        return [fqn for fqn in self._keys if fqn not in self._spectra]

    def store(self, fqn: str, terms: Decomposition) -> None:
        """Store one decomposition; the spectrum last, since it says that the factors are there."""
        small, factors = pack(terms)
        self._cache.put(f"{self._keys[fqn]}-factors", factors)
        self._cache.put(f"{self._keys[fqn]}-spectrum", small)
        self._spectra[fqn] = unpack(small)

    def spectrum(self, fqn: str) -> Decomposition:
        """Return the decomposition without its factors."""
        return self._spectra[fqn]

    def full(self, fqn: str) -> Decomposition | None:
        """Return the decomposition with its factors, or None when the cache lost them."""
        factors = self._cache.get(f"{self._keys[fqn]}-factors")
        spectrum = self._spectra[fqn]
        return None if factors is None else replace(spectrum, B=factors["B"], A=factors["A"])

    def curve(self, site: Site, form: Form) -> SiteCurve:
        """Return what a rank policy looks at."""
        terms = self._spectra[site.fqn]
        now, bias = site.map.cost(1), site.map.bias_cost(1)
        stays = site.fqn not in site.program.maps and bool(site.tied)  # what else reads the weight goes on reading it
        without = any(use.bias is None for use in site.uses if use.layout is None)
        return SiteCurve(
            name=site.fqn,
            out_features=site.out_features,
            in_features=site.in_features,
            losses=terms.losses(),
            S=terms.S,
            form=form if "pivoted" in site.layout.forms else "two_factor",
            bias=bias.parameters,
            extra=site.out_features if without and (terms.mean is not None or site.bias is not None) else 0,
            index=4 * site.out_features / site.dtype.itemsize,
            additive=terms.unit == LOSS_UNIT,
            itemsize=site.dtype.itemsize,
            looked_up=site.layout.looked_up,
            now={
                "numbers": now.parameters - bias.parameters,
                "bytes": 0 if stays else now.bytes - bias.bytes,
                "flops": now.flops - bias.flops,
            },
        )


def terms_key(site: Site, measured: str, solver: Any, max_rank: int, seed: int) -> str:
    """Return the content hash of everything that a decomposition depends on."""
    weight, bias = site.map.dense()
    return digest("decomposition-2", weight, bias, measured, solver.model_dump(), max_rank, seed, torch.__version__, site.fqn)


def solve_all(fqns: Sequence[str], solve: Callable[[str], T], workers: int) -> Iterator[T]:
    """Solve sites in parallel, one thread each, so that the bytes do not depend on how many are solved at a time.

    Yields every result when it is there.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = [pool.submit(solve, fqn) for fqn in fqns]
            try:
                for future in as_completed(waiting):
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


def generator_for(fqn: str, seed: int) -> torch.Generator:
    """Return a generator whose seed comes from the site's name, never from the order of solving."""
    return torch.Generator().manual_seed(int(digest("generator", fqn, seed)[:15], 16))


def empty_moments(_: str) -> Moments:
    """Return no statistics, for solvers and passes that ask for none."""
    return Moments()
