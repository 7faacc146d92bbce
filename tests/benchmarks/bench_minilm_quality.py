"""MiniLM: Spearman on STS-B after compressing the linears of its six encoder layers, the mean over five calibration draws.

    python tests/benchmarks/bench_minilm_quality.py [--kept 0.5 0.3 0.2] [--seeds 5] [--form auto] [--onnx] [--test]

The baseline is the dense model, and the other solvers at the same size (`--solver svd asvd fwsvd afm whitened kfac`).
`--onnx` scores the ONNX file by ONNX Runtime alone, `--test` scores the test split (once, at the end).
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import WORK, minilm, shared, show

import lrc
from lrc.data import Request
from lrc.data.files import read_rows
from lrc.lower.ort import OrtRunner
from lrc.spec.registry import METRICS
from lrc.verify.metrics.base import Subject, embeddings
from lrc.verify.metrics.spearman import COLUMNS, Spearman

LAYERS = ["encoder.layer.*.attention.**", "encoder.layer.*.{intermediate,output}.dense"]
SOLVERS: dict[str, Any] = {
    "kfac": {"type": "kfac", "fisher": "outputs"},
    "whitened": {"type": "whitened", "center": False},
    "afm": "afm",
    "asvd": "asvd",
    "fwsvd": {"type": "fwsvd", "fisher": "outputs"},
    "svd": "svd",
}


def sentences(folder: Path) -> Path:
    """Write every sentence of the training split, one a line."""
    path = folder / "sentences.txt"
    with shared("stsb/stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        path.write_text("\n".join(text for row in csv.reader(file) for text in row[:2]), encoding="utf-8")
    return path


def request(split: str) -> Request:
    return Request(
        str(shared(f"stsb/stsb-en-{split}.csv")),
        ["input_ids", "token_type_ids", "attention_mask"],
        task="sentence-similarity",
        tokenizer=minilm(),
        batch_size=64,
    )


def score(runner: Any, split: str) -> float:
    return float(METRICS.get("spearman")(Subject(runner, request(split)), Spearman()))


class Drift:
    """How far the embeddings of a split's sentences are from the dense model's: |E - E_dense| / |E_dense|, Frobenius norms."""

    def __init__(self, dense: Any, split: str) -> None:
        self.request = request(split)
        rows = read_rows(self.request.path, COLUMNS)
        self.texts = list(dict.fromkeys(str(row["sentence1"]) for row in rows))
        self.dense = embeddings(dense, self.texts, self.request)

    def of(self, runner: Any) -> float:
        return float((embeddings(runner, self.texts, self.request) - self.dense).norm() / self.dense.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--form", default="auto", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--solver", nargs="+", default=["kfac"], choices=list(SOLVERS))
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()
    split = "test" if options.test else "dev"
    WORK.mkdir(parents=True, exist_ok=True)
    program = lrc.capture(str(minilm()))
    rows: list[dict[str, Any]] = [{"solver": "dense", "kept": 1.0, "mean": round(score(program, split), 4)}]
    with tempfile.TemporaryDirectory() as name:
        data = sentences(Path(name))
        for solver in options.solver:
            for kept in options.kept:
                values, onnx_values, seconds = [], [], []
                for seed in range(options.seeds):
                    start = time.perf_counter()
                    done = lrc.compile(
                        program,
                        {
                            "version": 1,
                            "calibration": {"dataset": str(data), "samples": 256, "max_length": 128, "seed": seed},
                            "passes": [
                                {
                                    "type": "factorize",
                                    "targets": LAYERS,
                                    "solver": SOLVERS[solver],
                                    "rank": {"params_kept": kept},
                                    "form": options.form if solver == "kfac" else "two_factor",
                                }
                            ],
                        },
                        cache=WORK / "cache",
                    )
                    seconds.append(time.perf_counter() - start)
                    values.append(score(done.program, split))
                    if options.onnx:
                        file = done.to_onnx(Path(name) / "model.onnx")
                        onnx_values.append(score(OrtRunner(file), split))
                row = {
                    "solver": solver,
                    "kept": kept,
                    "form": options.form if solver == "kfac" else "two_factor",
                    "seeds": [round(v, 4) for v in values],
                    "mean": round(statistics.mean(values), 4),
                    "compile_seconds": [round(s, 1) for s in seconds],
                }
                if onnx_values:
                    row |= {"onnx": [round(v, 4) for v in onnx_values], "onnx_mean": round(statistics.mean(onnx_values), 4)}
                rows.append(row)
                print(row, flush=True)
    show("Spearman of MiniLM on STS-B", rows, split=split, calibration="256 training sentences a seed, no training")


if __name__ == "__main__":
    main()
