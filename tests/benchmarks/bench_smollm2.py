"""SmolLM2-135M: perplexity on WikiText-2 after compressing the 210 linears of its blocks.

    python tests/benchmarks/bench_smollm2.py [--kept 0.9 0.8 0.6] [--form auto] [--solver kfac …] [--propagate dense]

Calibration: 32 windows of 512 tokens of the validation text; perplexity: the first 8 windows of 512 tokens of the test text,
float32, each window alone. Baselines: the dense model, and plain SVD or whitened SVD at the same size.
"""

import argparse
import time
from typing import Any

from common import WORK, shared, show, smollm2

import lrc
from lrc.data import Request
from lrc.spec.registry import METRICS
from lrc.verify.metrics.base import Subject
from lrc.verify.metrics.perplexity import Perplexity

SOLVERS: dict[str, dict[str, Any]] = {
    "kfac": {"type": "kfac", "fisher": "labels"},
    "whitened": {"type": "whitened", "center": False},
    "dobi": {"type": "dobi"},
    "svd": {"type": "svd"},
}


SLICES: dict[str, dict[str, Any]] = {
    "slice": {"type": "slice"},
    "slice_residual": {"type": "slice", "signals": "residual"},
    "slice_block": {"type": "slice", "bases": "block"},
    "slice_block_residual": {"type": "slice", "bases": "block", "signals": "residual"},
}


def pass_of(solver: str, how: dict[str, Any], kept: float, form: str, steps: int) -> dict[str, Any]:
    common = {"targets": ["model.layers.**"], "rank": {"params_kept": kept}}
    if solver in SLICES:
        return {**SLICES[solver], **common}
    made = {"type": "factorize", "solver": how, "form": form if solver in ("kfac", "dobi") else "two_factor", **common}
    return {**made, "allocate": {"type": "learned", "steps": steps}} if solver == "dobi" else made


def perplexity(runner: Any, samples: int = 8) -> float:
    request = Request(
        str(shared("wikitext2/wiki.test.tokens")),
        ["input_ids", "attention_mask"],
        task="text-generation",
        tokenizer=smollm2(),
        samples=samples,
        max_length=512,
        batch_size=2,
        draw=False,
    )
    return float(METRICS.get("perplexity")(Subject(runner, request), Perplexity()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--form", default="auto", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--solver", nargs="+", default=["kfac"], choices=[*SOLVERS, *SLICES])
    parser.add_argument("--propagate", default="dense", choices=["dense", "compressed"])
    parser.add_argument("--steps", type=int, default=64, help="of the learned ranks of dobi")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    program = lrc.capture(str(smollm2()))
    rows: list[dict[str, Any]] = [{"solver": "dense", "kept": 1.0, "perplexity": round(perplexity(program), 2)}]
    print(rows[0], flush=True)
    for solver in options.solver:
        for kept in options.kept:
            start = time.perf_counter()
            how = dict(SOLVERS.get(solver, {}))
            if options.propagate == "compressed" and solver in ("kfac", "whitened"):
                how["propagate"] = "compressed"
            done = lrc.compile(
                program,
                {
                    "version": 1,
                    "calibration": {
                        "dataset": str(shared("wikitext2/wiki.valid.tokens")),
                        "samples": 32,
                        "max_length": 512,
                        "batch_size": 2,
                        "seed": options.seed,
                    },
                    "passes": [pass_of(solver, how, kept, options.form, options.steps)],
                },
                cache=WORK / "cache",
            )
            seconds = time.perf_counter() - start
            row = {"solver": solver, "kept": kept, "form": options.form, "propagate": options.propagate}
            row |= {"perplexity": round(perplexity(done.program), 2), "compile_seconds": round(seconds, 1)}
            row |= {"notes": list(done.plan.notes)} if done.plan.notes else {}
            rows.append(row)
            print(row, flush=True)
    show("perplexity of SmolLM2-135M on WikiText-2", rows, calibration="32 x 512 tokens of validation", test="8 x 512 tokens")


if __name__ == "__main__":
    main()
