"""eva: A from the principal components of what the layer reads; ranks where they explain most."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers.base import Initial, InitialiserOptions, Observer, Start, initialiser, lowrank_svd

SEED, NITER = 42, 4  # those of PEFT


@dataclass(frozen=True)
class Components:
    """Principal components (k, features), the share of the variance that each explains (k,), and singular values (k,)."""

    components: Tensor
    explained: Tensor
    S: Tensor
    converged: bool


class IncrementalPca:
    """Principal components of rows that come in batches: each batch is decomposed under what the earlier ones left.

    float32; the decomposition is randomised, of twice the components. Batches with fewer rows than components are left out.
    Source: Ross, Lim, Lin & Yang (2008), doi:10.1007/s11263-007-0075-7, section 3.1.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count = count
        self.tau = tau
        self.seen = 0
        self._mean = self._squares = torch.zeros(0, dtype=torch.float64)
        self._components = self._S = self._explained = torch.zeros(0)
        self.done = False

    def see(self, rows: Tensor) -> None:
        """Add the rows of a batch, (rows, features)."""
        X = rows.float()
        if len(X) < self.count:
            return
        batch_mean = X.double().mean(0)
        if self.seen == 0:
            self._mean, self._squares = torch.zeros_like(batch_mean), torch.zeros_like(batch_mean)
        total = self.seen + len(X)
        shift = batch_mean - self._mean
        self._squares = self._squares + (X.double() - batch_mean).square().sum(0) + shift.square() * self.seen * len(X) / total
        stacked = X - batch_mean.float()
        before = self._components
        if self.seen:
            correction = (self.seen * len(X) / total) ** 0.5 * -shift
            stacked = torch.cat([self._S[:, None] * before, stacked, correction[None].float()])
        _, S, Vh = lowrank_svd(stacked, min(2 * self.count, *stacked.shape), NITER, SEED)
        Vh = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        self._components, self._S = Vh[: self.count], S[: self.count]
        self._explained = self._S.double().square() / self._squares.sum().clamp(min=1e-300)
        self._mean, self.seen = self._mean + shift * len(X) / total, total
        if len(before):
            self.done = bool((torch.cosine_similarity(self._components, before) >= self.tau).all())

    def found(self) -> Components:
        """Return the components."""
        return Components(self._components, self._explained, self._S, self.done)


class Eva(InitialiserOptions):
    """A from principal components of the inputs, B zero; the ranks' sum goes where they explain most."""

    type: Literal["eva"] = "eva"
    rho: float = Field(default=2.0, ge=1, description="A rank is at most this often the rank asked for; 1 keeps all ranks.")
    tau: float = Field(default=0.99, gt=0, le=1, description="Cosine between batches at which a component has converged.")
    whiten: bool = Field(default=False, description="Divide the components by the root of their singular values.")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def observer(self, features: int, rank: int) -> Observer:
        """Return the incremental decomposition of round(rank * rho) components."""
        return IncrementalPca(min(round(rank * self.rho), features), self.tau)

    def ranks(self, wanted: Mapping[str, int], found: Callable[[str], Any]) -> Mapping[str, int]:
        """Give the sum of all ranks to the components that explain the largest shares of their layers' variance."""
        pairs = []
        for fqn, rank in wanted.items():
            shares = found(fqn).explained[: round(rank * self.rho)]
            pairs += [(-float(share), place, fqn) for place, share in enumerate(shares)]
        made = dict.fromkeys(wanted, 0)
        for _, _, fqn in sorted(pairs, key=lambda pair: pair[0])[: sum(wanted.values())]:
            made[fqn] += 1
        return made


@initialiser(Eva)
def eva(start: Start, options: Eva) -> Initial:
    """Return A = the first r principal components of the layer's inputs and B = 0: the sum starts as the base.

    A layer is done when all its components have converged (PEFT: those that its rank needs so far). Source: Paischer et al.
    (2024), arXiv:2410.07170, algorithm 1.
    """
    found: Components = start.observed
    if len(found.components) < start.rank:
        raise ValueError(f"no batch had as many rows as the {start.rank} components asked for: raise `calibration.batch_size`")
    A = found.components[: start.rank].clone()
    if options.whiten:
        A = A / found.S[: start.rank, None].sqrt()
    notes = () if found.converged else ("the principal components had not converged at the end of the calibration data",)
    return Initial(torch.zeros(start.shape[0], start.rank), A, notes=notes)
