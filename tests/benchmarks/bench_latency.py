"""Budgets of latency: predicted against measured time for random shapes, batches and budgets.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_latency.py [--triples 20] [--seed 0] [--largest 1536] [--seconds 450]

Every triple is a model of three linears of random sizes with ReLUs between, a batch of random size, and a budget
`latency_kept`. Baseline: the dense model. Three models take turns, each some runs in a row so that the caches hold what its own
runs leave there: the dense one, its compressed form, and a second dense copy, which shows what this machine calls equal. Every
layer is timed inside of its model's run.

`predicted` and `measured` are the layers' times as shares of the dense ones, `error` is the one over the other minus 1. `noise`
is how far the second dense copy is from the first, by the worse of its layers. A layer counts as slower only where its ratio to
dense is above 1 and above that of the second copy, each by two standard errors. No triple is begun after `--seconds`.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import show
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.measure import Latency, Ratio, ratio_to
from lrc.measure.operators import clock_for

BATCHES = (1, 4, 16, 64, 256, 1024)
RUNS = 3  # in a row; the first finds the caches of another model and does not count
SECONDS = 8.0  # what the rounds of one triple take, about
ROUNDS = (7, 41)
Clock = Callable[[], float]
MODELS = ("dense", "compressed", "again")


class Stack(nn.Module):
    """Linears with ReLUs between."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Timed(nn.Module):
    """A layer that notes how long each of its calls takes."""

    def __init__(self, layer: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.layer = layer
        self.clock = clock
        self.seconds: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        start = self.clock()
        y: Tensor = self.layer(x)
        self.seconds.append(self.clock() - start)
        return y


def with_timers(model: nn.Module, clock: Clock) -> list[Timed]:
    """Put a timer around every layer of a model; return them."""
    layers: Any = model.layers
    for i, layer in enumerate(layers):
        layers[i] = Timed(layer, clock)
    return list(layers)


def layer_times(models: Mapping[str, nn.Module], x: Tensor, clock: Clock) -> dict[str, list[Latency]]:
    """Return the times of every layer of every model, a value a round: the least of a round's runs but the first."""
    timers = {name: with_timers(model, clock) for name, model in models.items()}
    found: dict[str, list[list[float]]] = {name: [[] for _ in of_model] for name, of_model in timers.items()}

    def one_round(names: Sequence[str], *, counts: bool) -> None:
        for name in names:
            for timer in timers[name]:
                timer.seconds.clear()
            for _ in range(RUNS):
                models[name](x)
            if counts:
                for values, timer in zip(found[name], timers[name], strict=True):
                    values.append(min(timer.seconds[1:]))

    with torch.inference_mode():
        one_round(list(models), counts=False)
        begun = time.perf_counter()
        one_round(list(models), counts=False)
        rounds = int(min(max(SECONDS / max(time.perf_counter() - begun, 1e-9), ROUNDS[0]), ROUNDS[1]))
        for turn in range(rounds):
            one_round(list(models) if turn % 2 == 0 else list(models)[::-1], counts=True)
    return {name: [Latency(tuple(values)) for values in of_model] for name, of_model in found.items()}


def slower(changed: Ratio, same: Ratio) -> bool:
    """Say whether a layer takes longer than its dense form, beyond what two equal ones differ by."""
    return changed.low > max(1.0, same.high)


def judged(times: Mapping[str, list[Latency]], changed: Sequence[int], predicted: float) -> dict[str, Any]:
    """Return what came out of one triple: shares, error, noise, and the layers that got slower."""
    ratios = [ratio_to(*pair) for pair in zip(times["dense"], times["compressed"], strict=True)]
    equals = [ratio_to(*pair) for pair in zip(times["dense"], times["again"], strict=True)]
    before = [layer.median for layer in times["dense"]]
    measured = sum(ratio.value * ms for ratio, ms in zip(ratios, before, strict=True)) / sum(before)
    whole = sum(ratio.error * ms for ratio, ms in zip(ratios, before, strict=True)) / sum(before)
    return {
        "dense_ms": round(1e3 * sum(before), 3),
        "predicted": round(predicted, 3),
        "measured": round(measured, 3),
        "measured_within": round(whole, 3),
        "error": round(measured / predicted - 1, 3),
        "noise": round(max(max(abs(same.value - 1), same.error) for same in equals), 3),
        "slowest": round(max((ratios[i].value for i in changed), default=0.0), 3),
        "slower_layers": [i for i in changed if slower(ratios[i], equals[i])],
    }


def triple(draw: random.Random, largest: int) -> tuple[list[int], int, float]:
    sizes = [draw.randrange(64, largest + 1, 32) for _ in range(4)]
    return sizes, draw.choice(BATCHES), round(draw.uniform(0.4, 0.9), 2)


def measured(sizes: list[int], batch: int, kept: float, form: str, cache: Path, clock: Clock | None = None) -> dict[str, Any]:
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
    decisions = {d.name: d for d in done.plan.decisions}
    ordered = [decisions[f"layers.{i}"] for i in range(len(sizes) - 1)]
    again = Stack(sizes).eval()
    again.load_state_dict(model.state_dict())
    times = layer_times({"dense": model, "compressed": done.graft(model), "again": again}, x, clock or clock_for(x.device))
    before, after = (sum(d.latency[i] for d in ordered if d.latency) for i in (0, 1))
    found = judged(times, [i for i, d in enumerate(ordered) if d.rank is not None], after / before)
    ranks = {"ranks": [d.rank for d in ordered], "forms": [d.form for d in ordered]}
    return about | ranks | {"predicted_ms": round(after, 3)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", default="auto", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--largest", type=int, default=1536)
    parser.add_argument("--seconds", type=float, default=450.0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as cache:
        run = partial(measured, form=options.form, cache=Path(cache))
        for _ in range(options.triples):
            if time.perf_counter() - begun > options.seconds:
                break
            rows.append(run(*triple(draw, options.largest)))
            print(rows[-1], flush=True)
    show("budgets of latency", rows, form=options.form, dtype="float32", runtime="eager", **summary(rows, options.triples))


def summary(rows: Sequence[Mapping[str, Any]], asked: int) -> dict[str, Any]:
    """Return the figures over all triples."""
    found = [row for row in rows if "error" in row]
    errors = [abs(row["error"]) for row in found]
    return {
        "triples": f"{len(rows)} of {asked}",
        "median_error": statistics.median(errors) if errors else None,
        "largest_error": max(errors, default=None),
        "median_noise": statistics.median(row["noise"] for row in found) if found else None,
        "slowest_layer": max((row["slowest"] for row in found), default=None),
        "slower_layers_beyond_noise": sum(len(row["slower_layers"]) for row in found),
        "over_budget_beyond_noise": sum(row["measured"] - row["measured_within"] > row["asked"] * 1.05 for row in found),
        "refused": len(rows) - len(found),
    }


if __name__ == "__main__":
    main()
