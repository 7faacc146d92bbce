"""Clusters of rows: seeded far apart, moved to their means, and a soft assignment that gradients pass through."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 8192  # that are compared with all codewords at once


class Clusters(NamedTuple):
    """codewords: (k, d); codes: the nearest one of every row, (n,), int64; history: squared error after every turn."""

    codewords: Tensor
    codes: Tensor
    history: tuple[float, ...]


def kmeans(rows: Tensor, k: int, iterations: int, generator: torch.Generator) -> Clusters:
    """Return k codewords that stand for the rows (n, d), by at most `iterations` turns of Lloyd from a k-means++ start.

    Each turn moves every codeword to the mean of its rows, and a codeword without rows to a row that is far from its own;
    so the squared error never rises. Ends early where no row changes its codeword. Rows that are all alike in fewer than k
    ways are met exactly. Sources: Lloyd (1982), doi:10.1109/TIT.1982.1056489; Arthur & Vassilvitskii (2007), k-means++.
    """
    codewords = spread_out(rows, k, generator)
    codes = nearest(rows, codewords)
    history = [squared_error(rows, codewords, codes)]
    for _ in range(iterations):
        if history[-1] == 0:
            break
        codewords = means(rows, codewords, codes)
        moved = nearest(rows, codewords)
        history.append(squared_error(rows, codewords, moved))
        if torch.equal(moved, codes):
            break
        codes = moved
    return Clusters(codewords, codes, tuple(history))


def spread_out(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k of the rows, each drawn by its squared distance to those before it; zero distances are never drawn."""
    found = torch.empty(k, rows.shape[1], dtype=rows.dtype, device=rows.device)
    found[0] = rows[int(torch.randint(len(rows), (), generator=generator))]
    distances = (rows - found[0]).square().sum(1)
    for i in range(1, k):
        heap = distances.double().cumsum(0)
        if float(heap[-1]) == 0:  # fewer ways than codewords
            found[i:] = found[0]
            break
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * heap[-1]
        place = int(torch.searchsorted(heap, drawn, right=True).clamp(max=len(rows) - 1))
        found[i] = rows[place]
        distances = torch.minimum(distances, (rows - found[i]).square().sum(1))
    return found


def nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    """Return the place of the nearest codeword of every row, (n,), int64; of equally near ones the first."""
    return torch.cat([distances(part, codewords).argmin(1) for part in torch.split(rows, ROWS)])


def distances(rows: Tensor, codewords: Tensor) -> Tensor:
    """Return |row - codeword|² less |row|², which is the same for all codewords: (n, k)."""
    return torch.addmm(codewords.square().sum(1), rows, codewords.T, alpha=-2)


def squared_error(rows: Tensor, codewords: Tensor, codes: Tensor) -> float:
    """Return the squared distance of all rows to their codewords together."""
    return float((rows - codewords[codes]).double().square().sum())


def means(rows: Tensor, codewords: Tensor, codes: Tensor) -> Tensor:
    """Return the mean of the rows of every codeword; for codewords without any, the rows that are farthest from theirs."""
    counts = codes.bincount(minlength=len(codewords))
    sums = torch.zeros_like(codewords).index_add_(0, codes, rows)
    moved = sums / counts.clamp(min=1).to(sums.dtype)[:, None]
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        far = (rows - moved[codes]).square().sum(1).topk(min(len(empty), len(rows))).indices
        moved[empty[: len(far)]] = rows[far]
        moved[empty[len(far) :]] = rows[far[0]]
    return moved


def softly(rows: Tensor, codewords: Tensor, tau: float, iterations: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codewords after `iterations` soft turns, (k, d), and the rows made of them, (n, d), with their gradients.

    A = softmax(-|row - codeword|² / temperature) has rows that sum to 1; a turn moves the codewords to (Aᵀ rows) / (Aᵀ 1), and
    the rows are then A codewords. temperature: tau times the mean squared distance of the rows to their mean. metric: M
    (d, d'), for distances |(row - codeword) M|. Memory for the backward pass is that of `rows`, not of A.
    Source: Cho et al. (2022), DKM, arXiv:2108.12659.
    """
    measured = rows if metric is None else rows @ metric
    centred = (measured - measured.mean(0)).detach()
    temperature = tau * max(float(centred.square().sum(1).mean()), torch.finfo(rows.dtype).tiny)

    def weights(part: Tensor, E: Tensor) -> Tensor:
        seen, met = (part, E) if metric is None else (part @ metric, E @ metric)
        return torch.softmax(-distances(seen, met) / temperature, 1)

    def gathered(part: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        A = weights(part, E)
        return A.T @ part, A.sum(0)

    def made_of(part: Tensor, E: Tensor) -> Tensor:
        return weights(part, E) @ E

    E = codewords
    for _ in range(iterations):
        found = [checkpoint(gathered, part, E, use_reentrant=False) for part in torch.split(rows, ROWS)]
        sums, mass = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
        known = (mass > torch.finfo(rows.dtype).eps)[:, None]  # a codeword that no row is near stays
        E = torch.where(known, sums / torch.where(known, mass[:, None], torch.ones_like(mass)[:, None]), E)
    return E, torch.cat([checkpoint(made_of, part, E, use_reentrant=False) for part in torch.split(rows, ROWS)])
