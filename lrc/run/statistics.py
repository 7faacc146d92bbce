"""Decompositions on disk: computed once for a weight, its statistics and a solver; every rank and budget reads them again."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrc.measure import Cache, digest
from lrc.program import Site
from lrc.ranks import ProductForm, SiteCurve
from lrc.run.fronts import Choices, fronts, key_of, look
from lrc.run.summary import stays
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
    optional: dict[str, Any] = {name: small.get(name) for name in OPTIONAL}
    return Decomposition(factors["B"], factors["A"], small["S"], remainder, scale, unit, notes=tuple(notes), **optional)


class Terms:
    """The decompositions of one pass, by site."""

    def __init__(self, cache: Cache, keys: dict[str, str], choices: Mapping[str, Choices] | None = None) -> None:
        self._cache = cache
        self._keys = keys
        self._choices = choices or {}
        self._spectra: dict[str, Decomposition] = {}
        self._losses: dict[str, dict[str, Tensor]] = {}

    def missing(self) -> list[str]:
        """Return the sites whose decomposition is not stored yet."""
        for fqn, key in self._keys.items():
            small = None if fqn in self._spectra else self._cache.get(f"{key}-spectrum")
            losses = self._cache.get(self._front_key(fqn)) if self._choices.get(fqn) and small is not None else {}
            if small is not None and losses is not None:
                self._spectra[fqn], self._losses[fqn] = unpack(small), losses
        return [fqn for fqn in self._keys if fqn not in self._spectra]

    def store(self, site: Site, terms: Decomposition) -> None:
        """Store one decomposition and what other forms lose; the spectrum last, since it says that the factors are there."""
        fqn, (small, factors) = site.fqn, pack(terms)
        choices = self._choices.get(fqn)
        losses = look(site, terms, choices) if choices else {}
        if choices:
            self._cache.put(self._front_key(fqn), losses)
        self._cache.put(f"{self._keys[fqn]}-factors", factors)
        self._cache.put(f"{self._keys[fqn]}-spectrum", small)
        self._spectra[fqn], self._losses[fqn] = unpack(small), losses

    def _front_key(self, fqn: str) -> str:
        return f"{digest(self._keys[fqn], key_of(self._choices[fqn]))}-losses"

    def key(self, fqn: str) -> str:
        """Return the content hash of a site's decomposition."""
        return self._keys[fqn]

    def spectrum(self, fqn: str) -> Decomposition:
        """Return the decomposition without its factors."""
        return self._spectra[fqn]

    def full(self, fqn: str) -> Decomposition | None:
        """Return the decomposition with its factors, or None when the cache lost them."""
        factors = self._cache.get(f"{self._keys[fqn]}-factors")
        spectrum = self._spectra[fqn]
        return None if factors is None else replace(spectrum, B=factors["B"], A=factors["A"])

    def curve(self, site: Site, form: str) -> SiteCurve:
        """Return what a rank policy looks at."""
        terms = self._spectra[site.fqn]
        further = fronts(site, self._choices.get(site.fqn, {}), self._losses.get(site.fqn, {}))
        raised = site.fqn in site.program.maps
        without = site.bias is None if raised else any(use.bias is None for use in site.uses if use.layout is None)
        added = without and (terms.mean is not None or site.bias is not None)
        return replace(
            outline_of(site, form, len(terms.S)),
            losses=terms.losses(),
            S=terms.S,
            extra=site.out_features if added else 0,
            additive=terms.unit == LOSS_UNIT,
            fronts=further,
            only=bool(further) and form != "auto",
        )


def outline_of(site: Site, form: str, ranks: int) -> SiteCurve:
    """Return the curve of a site as far as its shape tells: products of up to so many ranks, without losses."""
    now, bias = site.map.cost(1), site.map.bias_cost(1)
    return SiteCurve(
        name=site.fqn,
        out_features=site.out_features,
        in_features=site.in_features,
        losses=torch.zeros(ranks + 1, dtype=torch.float64),
        S=torch.zeros(ranks, dtype=torch.float64),
        form="auto" if form == "auto" and "pivoted" in site.layout.forms else of_product(site, form),
        bias=bias.parameters,
        index=4 * site.out_features / site.dtype.itemsize,
        itemsize=site.dtype.itemsize,
        looked_up=site.layout.looked_up,
        now={
            "numbers": now.parameters - bias.parameters,
            "bytes": 0 if stays(site) else now.bytes - bias.bytes,
            "flops": now.flops - bias.flops,
        },
        groups=site.layout.groups,
    )


def of_product(site: Site, form: str) -> ProductForm:
    """Return the form of a product of two factors at a site: pivoted where that is asked for and there is one."""
    return "pivoted" if form == "pivoted" and form in site.layout.forms else "two_factor"


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
