"""Decomposing one 4096 x 4096 float32 weight at rank 1024: `randomized` and `gram` against torch.linalg.svd, interleaved.

The real weight is a mosaic of the up projections of SmolLM2-135M (24 of 1536 x 576 make 4608 x 4608), for no packaged model
has a matrix that large. Errors are relative to the least one of that rank, from singular values in float64.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import show, smollm2
from safetensors import safe_open
from torch import Tensor

from lrc.solvers import Decomposition, Moments, gram, randomized

LIMIT = {"1/i": 5.0, "real": 5.0, "gaussian": 1.8}


def mosaic(size: int) -> Tensor:
    with safe_open(smollm2() / "model.safetensors", "pt") as file:
        tiles = [file.get_tensor(f"model.layers.{i}.mlp.up_proj.weight").float() for i in range(24)]
    return torch.cat([torch.cat(tiles[8 * row : 8 * row + 8], 1) for row in range(3)])[:size, :size].contiguous()


def decaying(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return U / torch.arange(1, size + 1) @ V.T


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def excess(W: Tensor, product: Tensor, least: float) -> float:
    return float((W.double() - product.double()).norm()) / least - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(LIMIT), default=list(LIMIT))
    parser.add_argument("--gram", action="store_true", help="time the exact decomposition by the Gram matrix too")
    asked = parser.parse_args()
    make = {
        "1/i": decaying,
        "real": mosaic,
        "gaussian": lambda size: torch.randn(size, size, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for name in asked.only:
        W = make[name](asked.size)
        least = float(torch.linalg.svdvals(W.double())[asked.rank :].norm())
        rules = {"randomized": randomized, "gram": gram} if asked.gram else {"randomized": randomized}
        times: dict[str, list[float]] = {"torch.linalg.svd": [], "one product": [], **{rule: [] for rule in rules}}
        above, notes = dict.fromkeys(rules, 0.0), {}
        for turn in range(asked.rounds):
            for label, rule in rules.items():
                seed = torch.Generator().manual_seed(100 + turn)  # not that of the weight
                taken, terms = timed(lambda: rule(W, None, Moments(), asked.rank, rule.options(), seed))  # noqa: B023
                assert isinstance(terms, Decomposition)
                times[label].append(taken)
                above[label] = max(above[label], excess(W, terms.B @ terms.A, least))
                notes[label] = terms.notes
            times["torch.linalg.svd"].append(timed(lambda: torch.linalg.svd(W, full_matrices=False))[0])  # noqa: B023
            times["one product"].append(timed(lambda: W @ W)[0])  # noqa: B023
        ratios = [svd / own for svd, own in zip(times["torch.linalg.svd"], times["randomized"], strict=True)]
        rows.append(
            {
                "weight": name,
                "median_seconds": {label: round(sorted(t)[len(t) // 2], 2) for label, t in times.items()},
                "svd_over_randomized": [round(r, 2) for r in ratios],
                "wanted": LIMIT[name],
                "worst_error_above_least": {label: f"{value:.3%}" for label, value in above.items()},
                "notes": notes["randomized"],
            }
        )
        print(rows[-1], flush=True)
    show("svd", rows, shape=[asked.size, asked.size], rank=asked.rank, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
