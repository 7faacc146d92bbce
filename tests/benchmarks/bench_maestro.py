"""Maestro on CIFAR-10: a perceptron trained once in ordered factors, then cut to several budgets without further training.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_maestro.py [--epochs 40] [--kept 0.3 0.1 0.03]

3072 - 256 - 128 - 10, on 2000 images (the 1000 of the training split and the first half of every class of the test split of the
shared data), scored on the other 1000. maestro: factors of 0.95 of the break-even rank, ordered dropout and the lasso, cut by
`prune` to their first components (`order`) or to the largest singular directions of their products (`singular`). plain: the
same factors and steps without the recipe, cut likewise. Kept: share of the numbers of the two hidden weights, dense.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import show
from images import accuracy, cifar
from torch import Tensor, nn

import lrc
from lrc.maps import Chain
from lrc.program import Program

TARGETS = ["1", "3"]


def perceptron() -> nn.Module:
    """Three linears on flat images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the images and labels that are trained on, and those that are scored."""
    (x, y), (others, labels) = cifar("train_1000"), cifar("test_2000")
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        first[(labels == label).nonzero()[:100, 0]] = True
    return torch.cat([x, others[first]]), torch.cat([y, labels[first]]), others[~first], labels[~first]


def trained(x: Tensor, y: Tensor, epochs: int, recipe: dict[str, Any] | None) -> Program:
    """Train in factors, with the recipe or without."""
    train: dict[str, Any] = {
        "type": "train", "objective": "classification", "epochs": epochs, "batch_size": 50, "parameters": "all",
        "optimizer": {"type": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}, "schedule": "cosine",
        "recipe": recipe, "checkpoint_every": 10**6,
    }  # fmt: skip
    step = {"type": "factorize", "targets": TARGETS, "solver": "svd", "rank": {"breakeven": 0.95}, "form": "two_factor"}
    batches = [{"input": part, "labels": told} for part, told in zip(x.split(50), y.split(50), strict=True)]
    with tempfile.TemporaryDirectory() as cache:
        return lrc.compile(
            perceptron(),
            {"version": 1, "passes": [step, train]},
            inputs={"input": x[:4]},
            calibration=batches,
            cache=Path(cache),
        ).program


def score(program: Program, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy."""
    return accuracy(program.module(), images, labels)


def cut(program: Program, kept: float, criterion: str) -> tuple[Program, dict[str, int]]:
    """Return the program with so many numbers left of its dense ones, and the ranks."""
    chains = [made for made in program.maps.values() if isinstance(made, Chain)]
    dense = sum(made.out_features * made.in_features for made in chains)
    share = kept * dense / sum((made.out_features + made.in_features) * made.slots[1].shape[0] for made in chains)
    method = {"type": "ranks", "criterion": criterion, "rank": {"params_kept": min(1.0, share)}}
    with tempfile.TemporaryDirectory() as cache:
        done = lrc.compile(program, {"version": 1, "passes": [{"type": "prune", "method": method}]}, cache=Path(cache))
    made = done.program
    return made, {fqn: chain.slots[1].shape[0] for fqn, chain in made.maps.items() if isinstance(chain, Chain)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.3, 0.1, 0.03])
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y, images, labels = data()
    ordered = trained(x, y, given.epochs, {"type": "maestro", "group_lasso": 1e-6, "threshold": 1e-7})
    plain = trained(x, y, given.epochs, None)
    rows: list[dict[str, Any]] = [
        {"kept": "all", "maestro": score(ordered, images, labels), "plain": score(plain, images, labels)}
    ]
    for kept in given.kept:
        row: dict[str, Any] = {"kept": kept}
        for name, program in {"maestro": ordered, "plain": plain}.items():
            for criterion in ("order", "singular"):
                made, ranks = cut(program, kept, criterion)
                row[f"{name} {criterion}"] = (score(made, images, labels), ranks)
        rows.append(row)
    show("maestro", rows, images=len(x), scored=len(images), epochs=given.epochs)


if __name__ == "__main__":
    main()
