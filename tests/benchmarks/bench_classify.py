"""Sentence classification: MiniLM with a new head on SST-2, every adapter method for the same steps on the same batches.

    LRC_SHARED_DATA=... python tests/benchmarks/bench_classify.py [--methods lora sora …] [--steps 200] [--batch 16] [--seed 0]

Prints JSON: accuracy on the 872 sentences of the dev split, trained parameters (with and without those of pooler and head,
which every method trains along), seconds of the training, and the peak memory of a step, weights included. `none` trains the
head alone, `full` everything, at a tenth of the rates. The learning rate is that of `--rates` which is best after a quarter
of the steps on the last 500 training sentences, which no run trains on; dev is read for the figure alone. Every method has a
process of its own.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import WORK, minilm, shared, show

LAYERS = ["bert.encoder.layer.*.attention.**", "bert.encoder.layer.*.{intermediate,output}.dense"]
HEAD = ["classifier.*", "bert.pooler.**"]
LORA = {"method": "lora", "rank": 8, "alpha": 16}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {},
    "lora": LORA,
    "lora_ga": LORA | {"method": "rslora", "init": "lora_ga"},
    "lora_sb": {"method": "lora_xs", "rank": 32, "init": "lora_sb"},
    "sora": {"method": "sora", "rank": 8, "alpha": 16},
    "hydra": {"method": {"type": "hydra", "sequential": 4}, "rank": 4},
    "loldu": {"method": "loldu", "rank": {"fraction": 0.25}},
    "compacter": {"method": {"type": "compacter", "n": 4, "reduction": 8}},
}
HELD_OUT = 500


def rows_of(name: str) -> list[tuple[int, str]]:
    lines = shared(f"sentence_classification/{name}").read_text(encoding="utf-8").splitlines()
    return [(int(label), text) for label, _, text in (line.partition(" ") for line in lines)]


def write(path: Path, rows: list[tuple[int, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    return str(path)


def classifier(seed: int) -> Path:
    """MiniLM with a head of two classes, drawn by the seed."""
    folder = WORK / f"minilm_two_classes_{seed}"
    if not (folder / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

        logging.set_verbosity_error()  # the head is new, and is meant to be
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).save_pretrained(folder)
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    return folder


def passes_of(method: str, lr: float, steps: int, data: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    adapt = METHODS[method]
    train: dict[str, Any] = {
        "type": "train", "data": {"dataset": data, "max_length": 64}, "objective": "classification", "also": HEAD,
        "parameters": {"none": "factors", "full": "all"}.get(method, "inserted"), "seed": options.seed,
        "steps": steps, "batch_size": options.batch, "optimizer": {"type": "adamw", "lr": lr},
        "schedule": {"type": "linear", "warmup_ratio": 0.1},
    }  # fmt: skip
    if method == "sora":
        train["optimizer"] = {"type": "proximal_adamw", "lr": lr, "threshold": 1e-4}
        train["recipe"] = {"type": "sora", "to": 5e-4, "values": 4, "each": max(1, steps // 10)}
    return [*([{"type": "adapt", "targets": LAYERS, **adapt}] if adapt else []), train]


def one(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one method in this process; return its row."""
    import torch

    import lrc
    from lrc.data import Request
    from lrc.data.text import load_tokenizer, tokenize
    from lrc.spec.registry import METRICS
    from lrc.verify.metrics.accuracy import Accuracy
    from lrc.verify.metrics.base import Subject

    torch.set_num_threads(1)
    folder = classifier(options.seed)
    program = lrc.capture(str(folder))
    rows = rows_of("stsa.binary.train")
    training, held_out, test = rows[:-HELD_OUT], rows[-HELD_OUT:], rows_of("stsa.binary.dev")
    names = list(program.inputs.examples)
    drawn = [training[i] for i in torch.randperm(len(training), generator=torch.Generator().manual_seed(options.seed))[:64]]
    calibration = [
        {name: torch.tensor([values]) for name, values in sample.items()} | {"labels": torch.tensor([label])}
        for (label, _), sample in zip(
            drawn, tokenize(load_tokenizer(folder), [text for _, text in drawn], names, 64), strict=True
        )
    ]
    with tempfile.TemporaryDirectory() as name:
        data = write(Path(name) / "train.csv", training)

        def trained(lr: float, steps: int) -> Any:
            spec = {"version": 1, "passes": passes_of(method, lr, steps, data, options)}
            return lrc.compile(program, spec, cache=Path(name) / "cache", calibration=calibration)

        def accuracy(made: Any, judged: list[tuple[int, str]]) -> float:
            file = write(Path(name) / "judged.csv", judged)
            request = Request(file, names, task="text-classification", tokenizer=folder, batch_size=64, max_length=64)
            return round(float(METRICS.get("accuracy")(Subject(made.program, request), Accuracy())), 4)

        rates = [lr / 10 if method == "full" else lr for lr in options.rates]
        tried = {lr: accuracy(trained(lr, options.steps // 4), held_out) for lr in rates}
        best = max(tried, key=tried.__getitem__)
        start = time.perf_counter()
        done = trained(best, options.steps)
        seconds = time.perf_counter() - start
        record = done.training[0]
        head = sum(t.numel() for n, t in done.program.tensors().items() if n.startswith(("classifier.", "bert.pooler.")))
        return {
            "method": method, "accuracy": accuracy(done, test), "trained": record["parameters"],
            "trained_without_head": record["parameters"] - head, "lr": best, "held_out_after_a_quarter": tried,
            "loss": round(statistics.mean(row["loss"] for row in record["history"][-20:]), 4), "seconds": round(seconds, 1),
            "step_mib": {name: round((value or 0) / 2**20, 1) for name, value in record["memory"].items()},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    classifier(options.seed)
    rows = []
    for method in options.methods:
        again = [sys.executable, *sys.argv, "--one", method]
        rows.append(json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show("SST-2 by adapters", rows, steps=options.steps, batch=options.batch, seed=options.seed, split="dev")


if __name__ == "__main__":
    main()
