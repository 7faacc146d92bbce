"""Budgets of latency: predicted against measured time for random shapes, batches and budgets.

    python tests/benchmarks/bench_latency.py [--triples 20] [--seed 0] [--rounds 41] [--form auto] [--largest 1536]

Every triple is a model of three linears of random sizes with ReLUs between, a batch of random size, and a budget
`latency_kept`. Measured in one interleaved run: every layer before and after, and both models whole. Baseline: the dense
layers. `measured` and `predicted` are shares of the dense layers' time, `error` is the one over the other minus 1; `slowest`
is the largest ratio of a changed layer's time to its dense one: below 1 where every change gains.
"""

import argparse
import random
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import show
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.measure import measure_latency, speedup
from lrc.measure.operators import clock_for

BATCHES = (1, 4, 16, 64, 256, 1024)


class Stack(nn.Module):
    """Linears with ReLUs between."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def triple(draw: random.Random, largest: int) -> tuple[list[int], int, float]:
    sizes = [draw.randrange(64, largest + 1, 32) for _ in range(4)]
    return sizes, draw.choice(BATCHES), round(draw.uniform(0.4, 0.9), 2)


def measured(sizes: list[int], batch: int, kept: float, form: str, rounds: int, cache: Path) -> dict[str, Any]:
    """Compile one model and time what came out of it."""
    torch.manual_seed(sum(sizes))
    model = Stack(sizes).eval()
    x = torch.randn(max(batch, 2), sizes[0])
    about = {"sizes": sizes, "batch": len(x), "asked": kept}
    spec = {
        "version": 1,
        "passes": [
            {"type": "factorize", "solver": "svd", "rank": {"latency_kept": kept}, "allocate": "global", "form": form},
        ],
    }
    try:
        done = lrc.compile(model, spec, inputs={"x": x}, cache=cache)
    except UsageError as error:
        return about | {"refused": str(error)}
    clock = clock_for(torch.device("cpu"))
    compressed = done.graft(model)
    changed = [d.name for d in done.plan.decisions if d.rank is not None]
    calls: dict[str, Any] = {"dense model": partial(model, x), "compressed model": partial(compressed, x)}
    for name, site in done.dense.sites.items():
        given = torch.randn(len(x), site.in_features)
        calls[f"{name} dense"] = partial(site.map, given)
        calls[f"{name} compressed"] = partial(done.program.map_of(name), given)
    with torch.inference_mode():
        times = measure_latency(calls, rounds=rounds, clock=clock)
    before, after = (sum(d.latency[i] for d in done.plan.decisions if d.latency) for i in (0, 1))
    now, then = (1e3 * sum(times[f"{name} {which}"].median for name in done.dense.sites) for which in ("compressed", "dense"))
    ratios = [1 / speedup(times[f"{name} dense"], times[f"{name} compressed"]) for name in changed]
    return about | {
        "ranks": [d.rank for d in done.plan.decisions],
        "forms": [d.form for d in done.plan.decisions],
        "dense_ms": round(then, 3),
        "predicted_ms": round(after, 3),
        "measured_ms": round(now, 3),
        "predicted": round(after / before, 3),
        "measured": round(now / then, 3),
        "error": round(now / then / (after / before) - 1, 3),
        "slowest": round(max(ratios, default=0.0), 3),
        "whole_model": round(1 / speedup(times["dense model"], times["compressed model"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--form", default="auto", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--largest", type=int, default=1536)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as cache:
        rows = [
            measured(*triple(draw, options.largest), options.form, options.rounds, Path(cache)) for _ in range(options.triples)
        ]
    found = [row for row in rows if "error" in row]
    errors = sorted(abs(row["error"]) for row in found)
    show(
        "budgets of latency",
        rows,
        form=options.form,
        dtype="float32",
        runtime="eager",
        median_error=errors[len(errors) // 2],
        largest_error=errors[-1],
        slowest_layer=max(row["slowest"] for row in found),
        over_budget=sum(row["measured"] > row["asked"] * 1.1 for row in found),
        refused=len(rows) - len(found),
    )


if __name__ == "__main__":
    main()
