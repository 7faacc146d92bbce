"""Completing a 2000 x 1500 matrix of low rank from few of its entries: time against entries times rank.

The matrix is planted (singular values from 100 down to 30, random orthonormal factors), its known entries are uniformly random.
The baseline is exact alternating least squares as it is usually written: one numpy solve for every column, then for every
row. All ways start from the same masked SVD, take turns, and are timed by their fastest sweep; the first case is also run
by the baseline until its error on the unknown entries is as small. Then the same two ways with a weight for every entry.
Times are of the processor, on one thread (set OMP_NUM_THREADS=1 for numpy too). `--plot FILE.svg` draws time against
entries times rank there; without it the plot is `completion.svg` in the folder of the benchmarks.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WORK, show
from torch import Tensor

from lrc.report.svg import Axis, Series, chart
from lrc.solvers.alternating import Matrix, balanced, masked_svd
from lrc.solvers.elementwise import Elementwise
from lrc.solvers.entries import Entries
from lrc.solvers.halfstep import refitted

WANTED = 1e-8  # relative error on the entries that were not known
RIDGE = 1e-10
WAYS = ["exact", "sketch_pcg", "reference"]
Pair = tuple[Tensor, Tensor]
Sweep = Callable[[Tensor, Tensor], Pair]


def planted(rows: int, columns: int, rank: int, generator: torch.Generator) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))[0] for size in (rows, columns))
    return U * torch.linspace(100, 30, rank, dtype=torch.float64) @ V.T


def ours(problem: Matrix, lsq: Any, ridge: float, generator: torch.Generator) -> Sweep:
    def sweep(U: Tensor, V: Tensor) -> Pair:
        V = refitted(problem.T, U, V, ridge, lsq, generator)
        return balanced(refitted(problem, V, U, ridge, lsq, generator), V)

    return sweep


def reference(problem: Entries, ridge: float) -> Sweep:
    def rows_of(side: Entries) -> list[tuple[Any, Any]]:
        bounds = zip(side.start.tolist(), side.start.tolist()[1:], strict=False)
        return [(side.column[low:high].numpy(), side.value[low:high].numpy()) for low, high in bounds]

    def half(known: list[tuple[Any, Any]], F: Any) -> Any:
        eye = ridge * np.eye(F.shape[1])
        return np.stack([np.linalg.solve(F[at].T @ F[at] + eye, F[at].T @ values) for at, values in known])

    by_row, by_column = rows_of(problem), rows_of(problem.T)

    def sweep(U: Tensor, V: Tensor) -> Pair:
        fitted = half(by_column, U.numpy())
        return balanced(torch.from_numpy(half(by_row, fitted)), torch.from_numpy(fitted))

    return sweep


def unknown_error(M: Tensor, known: Tensor, U: Tensor, V: Tensor) -> float:
    return float(((U @ V.T - M)[~known]).norm() / M[~known].norm())


def solved(M: Tensor, known: Tensor, sweep: Sweep, start: Pair, most: int) -> tuple[int, float, float]:
    """Return the sweeps, the seconds and the error on unknown entries, once that is as small as wanted."""
    (U, V), spent, error, count = start, 0.0, 1.0, 0
    while error >= WANTED and count < most:
        count += 1
        begun = time.process_time()
        U, V = sweep(U, V)
        spent += time.process_time() - begun
        error = unknown_error(M, known, U, V)
    return count, spent, error


def fastest(sweeps: dict[str, Sweep], start: Pair, rounds: int) -> dict[str, float]:
    """Return the fewest milliseconds of one sweep, each way in its turn, from where a few sweeps lead."""
    for _ in range(3):
        start = sweeps["exact"](*start)
    times: dict[str, list[float]] = {way: [] for way in sweeps}
    for _ in range(rounds):
        for way, sweep in sweeps.items():
            begun = time.process_time()
            sweep(*start)
            times[way].append(1e3 * (time.process_time() - begun))
    return {way: round(min(taken), 1) for way, taken in times.items()}


def case(rows: int, columns: int, rank: int, share: float, asked: argparse.Namespace, *, compare: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    M = planted(rows, columns, rank, generator)
    known = torch.rand(rows, columns, generator=generator) < share
    begun = time.process_time()
    problem = Entries.of(M, known.double())
    start = masked_svd(problem, rank, generator)
    begun, prepared = time.process_time(), time.process_time() - begun
    ridge = RIDGE * problem.mean_weight * 100
    sweeps = {
        "exact": ours(problem, "exact", ridge, generator),
        "sketch_pcg": ours(problem, "sketch_pcg", ridge, generator),
        "reference": reference(problem, ridge),
    }
    count, spent, error = solved(M, known, sweeps["exact"], start, asked.sweeps)
    entries, dense = len(problem.value), rows * columns
    row = {
        "rank": rank,
        "entries": entries,
        "share": f"{entries / dense:.1%}",
        "entries_over_unknowns": round(entries / (rank * (rows + columns - rank)), 1),
        "million_entries_times_rank": round(entries * rank / 1e6, 2),
        "sorting_and_start_seconds": round(prepared, 2),
        "sweeps": count,
        "seconds": round(spent, 2),
        "error_on_unknown_entries": f"{error:.1e}",
        "milliseconds_per_sweep": fastest(sweeps, start, asked.rounds),
    }
    if compare:
        for way in ("sketch_pcg", "reference"):
            found = solved(M, known, sweeps[way], start, asked.sweeps)
            row[f"{way}_sweeps_seconds_error"] = [found[0], round(found[1], 2), f"{found[2]:.1e}"]
    print(row, flush=True)
    return row


def weighed(rows: int, columns: int, rank: int, rounds: int) -> dict[str, Any]:
    """Return the times of a sweep over a random matrix with log-uniform weights at every entry."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    problem = Elementwise(M, 10 ** (4 * torch.rand(rows, columns, dtype=torch.float64, generator=generator) - 2))
    ridge = RIDGE * problem.mean_weight
    sweeps = {lsq: ours(problem, lsq, ridge, generator) for lsq in WAYS[:2]}
    row = {
        "rank": rank,
        "shape": [rows, columns],
        "milliseconds_per_sweep": fastest(sweeps, masked_svd(problem, rank, generator), rounds),
    }
    print(row, flush=True)
    return row


def line(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
    """Return the straight line through time per sweep against entries times rank, and how far off it the worst case is."""
    x = np.array([row["million_entries_times_rank"] for row in rows])
    y = np.array([row["milliseconds_per_sweep"][way] for row in rows])
    each, fixed = np.polyfit(x, y, 1)
    worst = float(np.abs((fixed + each * x) / y - 1).max())
    return {"fixed_ms": round(float(fixed), 1), "ms_per_million": round(float(each), 2), "worst_deviation": round(worst, 3)}


def plot(rows: list[dict[str, Any]], file: Path) -> str:
    """Draw milliseconds per sweep against entries times rank, both logarithmic, into a file; return its name."""
    series = [
        Series(way, [(row["million_entries_times_rank"], row["milliseconds_per_sweep"][way]) for row in rows], line=False)
        for way in WAYS
    ]
    x, y = Axis("entries x rank, millions", log=True), Axis("milliseconds per sweep", log=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(chart(series, x, y, "Completing a matrix", alone=True) + "\n", encoding="utf-8")
    return file.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=1500)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.03, 0.04, 0.06, 0.08, 0.12, 0.16])
    parser.add_argument("--ranks", type=int, nargs="*", default=[5, 10, 20, 40], help="at --ranks-share")
    parser.add_argument("--ranks-share", type=float, default=0.2)
    parser.add_argument("--weighed-shape", type=int, nargs=2, default=[1000, 750])
    parser.add_argument("--weighed-ranks", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=WORK / "completion.svg", help="where the plot goes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shape = asked.rows, asked.columns
    by_entries = [case(*shape, asked.rank, share, asked, compare=share == asked.shares[0]) for share in asked.shares]
    by_rank = [case(*shape, rank, asked.ranks_share, asked, compare=False) for rank in asked.ranks]
    growth = {way: line(by_entries, way) for way in WAYS} if len(by_entries) > 2 else {}
    dense = [weighed(*asked.weighed_shape, rank, asked.rounds) for rank in asked.weighed_ranks]
    about = {
        "shape": list(shape),
        "weighed": dense,
        "threads": 1,
        "lines": growth,
        "plot": plot(by_entries + by_rank, asked.plot),
    }
    show("completion", by_entries + by_rank, **about)


if __name__ == "__main__":
    main()
