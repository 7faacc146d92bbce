"""Maestro on CIFAR-10: a perceptron trained once in ordered factors, then cut to several budgets without further training.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_maestro.py [--epochs 40] [--kept 0.3 0.1 0.03]

3072 - 256 - 128 - 10, on 2000 images (the 1000 of the training split and the first half of every class of the test split of the
shared data), scored on the other 1000. maestro: factors of 0.95 of the break-even rank, ordered dropout and the lasso, cut by
importance. plain: the same factors and steps without the recipe, cut to the same ranks each, by the SVD of its trained weights.
Kept: share of the numbers of the two hidden weights.
"""

import argparse
import copy
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
from lrc.train.recipes.maestro import truncate

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


def by_svd(program: Program, widths: dict[str, int]) -> Program:
    """Return the program with each product cut to a rank by its SVD."""
    made = program.clone()
    for fqn, rank in widths.items():
        layer = made.maps[fqn]
        U, S, Vh = torch.linalg.svd(layer.dense().weight.detach(), full_matrices=False)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        made.replace(fqn, Chain(U[:, :rank] * S[:rank], Vh[:rank].clone(), bias=bias))
    return made


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
        cut = copy.copy(ordered).clone()
        notes = truncate(cut, kept)
        widths = {fqn: made.slots[1].shape[0] for fqn, made in cut.maps.items() if isinstance(made, Chain)}
        found = {"maestro": score(cut, images, labels), "plain": score(by_svd(plain, widths), images, labels)}
        rows.append({"kept": kept, **found, "ranks": widths, "notes": notes})
    show("maestro", rows, images=len(x), scored=len(images), epochs=given.epochs)


if __name__ == "__main__":
    main()
