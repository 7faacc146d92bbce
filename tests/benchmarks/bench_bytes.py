"""Quality against bytes: few bits, products, and sums of the two, on MiniLM (Spearman on STS-B) and SmolLM2-135M (perplexity).

    python tests/benchmarks/bench_bytes.py [--model minilm smollm2] [--only nf4 lq3 …] [--seed 0]

Targets are the linears of all blocks; "mb" is what they take, in 10^6 bytes, "share" of what they took. Calibration as in
`bench_minilm_quality.py` and `bench_smollm2.py`; the baseline is the dense model.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_minilm_quality import LAYERS, score, sentences
from bench_smollm2 import perplexity
from common import WORK, minilm, shared, show, smollm2

import lrc

FACTORIZE: dict[str, Any] = {"type": "factorize", "solver": {"type": "kfac"}}
WAYS: dict[str, list[dict[str, Any]]] = {
    "nf4": [{"type": "quantize", "format": "nf4"}],
    "nf3": [{"type": "quantize", "format": "nf3"}],
    "nf2": [{"type": "quantize", "format": "nf2"}],
    "int8": [{"type": "quantize", "format": "int8"}],
    "int4": [{"type": "quantize", "format": "int4"}],
    "lq 4": [{"type": "split", "solver": {"type": "lq", "bits": 4.0, "iterations": 10}, "rank": {"fraction": 0.0834}}],
    "lq 2.75": [{"type": "split", "solver": {"type": "lq", "bits": 2.75, "iterations": 10}, "rank": {"fraction": 0.0834}}],
    "loftq nf3": [
        {"type": "split", "solver": {"type": "loftq", "format": "nf3", "iterations": 5}, "rank": {"fraction": 0.0834}}
    ],
    "kfac 0.5": [FACTORIZE | {"rank": {"params_kept": 0.5}}],
    "kfac 0.5 + nf4": [FACTORIZE | {"rank": {"params_kept": 0.5}, "form": "two_factor"}, {"type": "quantize", "format": "nf4"}],
    "kfac 0.7 + nf4": [FACTORIZE | {"rank": {"params_kept": 0.7}, "form": "two_factor"}, {"type": "quantize", "format": "nf4"}],
    "oats 0.5": [
        {"type": "split", "solver": {"type": "oats", "iterations": 20}, "rank": {"params_kept": 0.5}, "rank_share": 0.25}
    ],
    "slim 2:4": [{"type": "split", "solver": {"type": "slim", "pattern": "2:4"}, "rank": {"fraction": 0.0834}}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["minilm"], choices=["minilm", "smollm2"])
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for model in options.model:
            texts = {"dataset": str(sentences(Path(name))), "samples": 256, "max_length": 128, "seed": options.seed}
            stream = {"dataset": str(shared("wikitext2/wiki.valid.tokens")), "samples": 32, "max_length": 512, "batch_size": 2}
            small = model == "minilm"
            program = lrc.capture(str(minilm() if small else smollm2()))
            rows.append({"model": model, "way": "dense", "share": 1.0, "quality": quality(program, small)})
            print(rows[-1], flush=True)
            for way in options.only:
                start = time.perf_counter()
                kfac = {"type": "kfac", "fisher": "outputs" if small else "labels"}
                targets = {"targets": LAYERS if small else ["model.layers.**"]}
                steps = [
                    step | targets | ({"solver": kfac} if step["type"] == "factorize" else {}) for step in WAYS[way]
                ]  # fmt: skip
                spec = {"version": 1, "calibration": texts if small else stream | {"seed": options.seed}, "passes": steps}
                done = lrc.compile(program, spec, cache=WORK / "cache")
                seconds = time.perf_counter() - start
                first = [d for d in done.plan.decisions if d.index == 0]
                names = [d.name for d in first]
                before = sum(d.before.bytes for d in first)
                after = sum(done.program.sites[fqn].map.cost().bytes for fqn in names)
                rows.append({
                    "model": model, "way": way, "mb": round(after / 1e6, 2), "share": round(after / before, 4),
                    "quality": quality(done.program, small), "seconds": round(seconds, 1),
                })  # fmt: skip
                print(rows[-1], flush=True)
    show("quality against bytes", rows, quality="Spearman on STS-B dev (minilm), perplexity on WikiText-2 (smollm2)")


def quality(program: Any, small: bool) -> float:
    return round(score(program, "dev"), 4) if small else round(perplexity(program), 2)


if __name__ == "__main__":
    main()
