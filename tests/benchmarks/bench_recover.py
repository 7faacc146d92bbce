"""Recovery by distillation: MiniLM at a share of its parameters, then some minutes of training on unlabelled sentences.

    LRC_SHARED_DATA=... python tests/benchmarks/bench_recover.py --kept 0.3 --steps 600 --lr 5e-4 --seeds 0 1 2

Prints JSON: Spearman on STS-B dev before and after the training, its losses, and how long it took. The sentences are those
of the train split, without their scores; dev is read for the figure alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_minilm_quality import LAYERS, WORK, minilm, score, sentences
from common import show

import lrc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--rank", type=int, help="of low-rank updates; without it factors move in full")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration draw and training")
    parser.add_argument("--least", type=float, default=0.85, help="exit with 3 where the mean over seeds is below")
    parser.add_argument("--test", action="store_true", help="score the test split, which no setting was chosen on")
    options = parser.parse_args()
    split = "test" if options.test else "dev"
    WORK.mkdir(parents=True, exist_ok=True)
    program = lrc.capture(str(minilm()))
    thin = {"updates": "low_rank", "rank": options.rank} if options.rank else {}
    rows: list[dict[str, Any]] = [{"what": "dense", "spearman": round(score(program, split), 4)}]
    reached: dict[float, list[float]] = {lr: [] for lr in options.lr}
    with tempfile.TemporaryDirectory() as name:
        data = str(sentences(Path(name)))
        squeeze = {
            "type": "factorize", "targets": LAYERS, "solver": {"type": "kfac", "fisher": "outputs"},
            "rank": {"params_kept": options.kept}, "form": "two_factor",
        }  # fmt: skip
        for seed in options.seeds:
            calibration = {"dataset": data, "samples": 256, "max_length": 128, "seed": seed}
            spec = {"version": 1, "calibration": calibration, "passes": [squeeze]}
            done = lrc.compile(program, spec, cache=WORK / "cache")
            rows.append({"what": "factorize", "seed": seed, "spearman": round(score(done.program, split), 4)})
            print(rows[-1], flush=True)
            for lr in options.lr:
                train = {
                    "type": "train", "data": data, "steps": options.steps, "batch_size": options.batch, "seed": seed,
                    "dropout": options.dropout, "objective": {"type": "distillation", "hidden": options.hidden},
                    "recipe": {"type": "recover", **thin}, "optimizer": {"type": "adamw", "lr": lr},
                    "schedule": {"type": "cosine", "warmup_ratio": 0.05},
                }  # fmt: skip
                start = time.perf_counter()
                trained = lrc.compile(program, spec | {"passes": [squeeze, train]}, cache=WORK / "cache")
                every = [row["loss"] for row in trained.training[0]["history"]]
                value = score(trained.program, split)
                reached[lr].append(value)
                rows.append({
                    "what": "factorize, train", "seed": seed, "lr": lr, "steps": options.steps, "batch": options.batch,
                    "rank": options.rank, "spearman": round(value, 4), "seconds": round(time.perf_counter() - start, 1),
                    "loss": [round(statistics.mean(p), 5) for p in (every[:20], every[len(every) // 2 :][:20], every[-20:])],
                })  # fmt: skip
                print(rows[-1], flush=True)
    means = {lr: round(statistics.mean(values), 4) for lr, values in reached.items()}
    show("Recovery of MiniLM by distillation", rows, split=split, kept=options.kept, means=means)
    if max(means.values()) < options.least:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
