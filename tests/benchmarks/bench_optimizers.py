"""GaLore and Fira beside the packages of their authors: time of a step, in an interleaved run.

    python tests/benchmarks/bench_optimizers.py

Prints JSON: for every method the median of the ratios ours / theirs over pairs of steps that stand next to each other, with and
without a new subspace. Needs `pip install --no-deps galore-torch fira`.
"""

import importlib.util
import json
import statistics
import sys
import time
import warnings
from types import ModuleType
from typing import Any

import torch

from lrc.train.optim import Fira, GaLore

SHAPES = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
RANK, GAP, STEPS = 64, 50, 200


def authors(package: str, module: str) -> Any:
    """Return the authors' optimiser; the package itself may import what only a GPU needs."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    made = ModuleType(package)
    made.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = made
    return importlib.import_module(f"{package}.{module}").AdamW


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def timed(optimizer: torch.optim.Optimizer, given: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> float:
    for p, grad in zip(given, grads, strict=True):
        p.grad = grad.clone()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for ours, package, module, scale in ((GaLore, "galore_torch", "adamw", "scale"), (Fira, "fira", "fira_adamw", "alpha")):
        a, b = parameters(), parameters()
        options = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std"}
        left = ours(a, lr=1e-3, scale=0.25, **options)
        right = authors(package, module)([{"params": b, **options, scale: 0.25}], lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        plain, refreshed = [], []
        for step in range(STEPS):
            grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
            order = [(left, a), (right, b)] if step % 2 else [(right, b), (left, a)]
            spent = {id(optimizer): timed(optimizer, given, grads) for optimizer, given in order}
            (refreshed if step % GAP == 0 else plain).append(spent[id(left)] / spent[id(right)])
        same = max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))
        rows.append({
            "method": ours.__name__, "ratio": round(statistics.median(plain), 3),
            "ratio_with_new_subspace": round(statistics.median(refreshed), 3), "largest_difference": same,
        })  # fmt: skip
    print(json.dumps({"shapes": SHAPES, "rank": RANK, "steps": STEPS, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
