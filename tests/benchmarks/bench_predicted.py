"""MiniLM: the loss that `auto` predicts against the one that is measured, for one kind of option everywhere.

    python tests/benchmarks/bench_predicted.py [--only nf3 …] [--seed 0]

Calibration as in `bench_minilm_quality.py`. Predicted: the sum over sites, in nats per token of a Gaussian around the
embedding, with the damping of `kfac`. Measured: half the squared change of the embeddings of 256 sentences of the dev split,
over their tokens. What matters is that the ratio is the same for all kinds of options, not that it is 1.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import LAYERS, score, sentences
from common import WORK, minilm, shared, show
from transformers import AutoTokenizer

import lrc
from lrc.program.readout import readout

ONE: dict[str, dict[str, Any]] = {
    **{f"{n} nearest": {"type": "quantize", "formats": [n], "rounding": "nearest"} for n in ("nf2", "nf3", "nf4")},
    **{n: {"type": "quantize", "formats": [n]} for n in ("nf2", "nf3", "nf4")},
    "rank 0.5": {"type": "factorize", "ranks": [0.5], "forms": ["pivoted"]},
    "rank 0.3": {"type": "factorize", "ranks": [0.3], "forms": ["pivoted"]},
    "rank 0.5 in nf4": {"type": "quantized_factors", "ranks": [0.5], "formats": ["nf4"]},
    "nf2 + 0.05": {"type": "split", "ranks": [0.05], "formats": ["nf2"]},
    "sparse 0.5": {"type": "prune", "densities": [0.5], "patterns": []},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(ONE), choices=list(ONE))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    program = lrc.capture(str(minilm()))
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    with shared("stsb/stsb-en-dev.csv").open(newline="", encoding="utf-8") as file:
        texts = [row[0] for row in csv.reader(file)][:256]
    batches = [
        dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    def embeddings(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([readout(of(**batch), batch, of.task) for batch in batches])

    dense = embeddings(program)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        data = {"dataset": str(sentences(Path(name))), "samples": 256, "max_length": 128, "seed": options.seed}
        for way in options.only:
            step = {
                "type": "auto", "targets": LAYERS, "ways": [ONE[way]], "solver": {"type": "kfac", "fisher": "outputs"},
            }  # fmt: skip
            least = {"budget": {"size_mb": size_of(program, step, data)}}
            done = lrc.compile(
                program, {"version": 1, "calibration": data, "passes": [step | least]}, cache=WORK / "cache"
            )  # fmt: skip
            predicted = sum(d.predicted or 0.0 for d in done.plan.decisions)
            measured = 0.5 * float((embeddings(done.program) - dense).square().sum()) / tokens
            kept = sum(d.keep is not None for d in done.plan.decisions)
            rows.append({
                "option": way, "kept": kept, "predicted": predicted, "measured": measured,
                "ratio": round(predicted / measured, 2), "dev": round(score(done.program, "dev"), 4),
            })  # fmt: skip
            print(rows[-1], flush=True)
    show("predicted against measured loss", rows, model="MiniLM", seed=options.seed)


def size_of(program: Any, step: dict[str, Any], data: dict[str, Any]) -> float:
    """Return the size of the model with the option everywhere, in MB: of a budget too small, the least that is named."""
    from lrc.errors import UsageError

    try:
        lrc.plan(
            program, {"version": 1, "calibration": data, "passes": [step | {"budget": {"size_mb": 1e-3}}]}, cache=WORK / "cache"
        )  # fmt: skip
    except UsageError as error:
        return float(str(error.expected).split()[2])
    raise SystemExit("the model is smaller than 1 kB")


if __name__ == "__main__":
    main()
