"""Every solver for language models side by side: perplexity, size, time and memory at three budgets.

    python tests/benchmarks/bench_llm_solvers.py [--models smollm2 stories260k] [--only kfac modular] [--kept 0.8 0.6 0.4]

SmolLM2-135M: calibrated on 32 windows of 512 tokens of WikiText-2's validation text, perplexity of the first 8 windows of the
test text. stories260k: calibrated on the first four of its sample stories, scored on all five. All linears of the blocks are
compressed, together to `params_kept`. Every row runs in a process of its own, whose peak of memory is that of compiling, and
is added to `--rows FILE` when it is there: a run that was interrupted goes on where it stopped. The times of a method's first
row are without any cache; the others find its statistics (`cached`). The table has those of the processor, `cpu_seconds` of all
threads, which other jobs of the machine hardly change. A method that this version lacks is left out, and named.
"""

import argparse
import importlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import WORK, shared, show, smollm2

import lrc
from lrc.spec.registry import PASSES, SOLVERS

KEPT = [0.8, 0.6, 0.4]
LABELS = {"fisher": "labels"}
TWO = {"form": "two_factor"}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"solver": {"type": "svd"}, **TWO},
    "asvd": {"solver": {"type": "asvd"}, **TWO},
    "fwsvd": {"solver": {"type": "fwsvd", **LABELS}, **TWO},
    "whitened": {"solver": {"type": "whitened", "center": False}, **TWO},
    "basis_sharing": {"solver": {"type": "basis_sharing"}},
    "modular": {"solver": {"type": "modular", **LABELS}},
    "slice": {"type": "slice"},
    "kfac": {"solver": {"type": "kfac", **LABELS, "modules": False}},
    "kfac_modules": {"solver": {"type": "kfac", **LABELS}},
    "default": {},
}


def missing(method: str) -> bool:
    """Say whether this version lacks a method."""
    recipe = METHODS[method]
    solver = recipe.get("solver", {}).get("type", "svd")
    return recipe.get("type", "factorize") not in PASSES.names() or solver not in SOLVERS.names()


def spec(method: str, kept: float) -> dict[str, Any]:
    """Return the one pass of a row."""
    return {"type": "factorize", "targets": ["model.layers.**"], "rank": {"params_kept": kept}, **METHODS[method]}


def run_row(model: str, method: str, kept: float) -> dict[str, Any]:
    """Compile, and score, in this process."""
    cache = WORK / "llm_solvers" / f"{model}-{method}"
    before = cache.is_dir()
    document: dict[str, Any] = {"version": 1, "passes": [spec(method, kept)]}
    given: dict[str, Any] = {}
    if model == "smollm2":
        program = lrc.capture(str(smollm2()))
        text = str(shared("wikitext2/wiki.valid.tokens"))
        document["calibration"] = {"dataset": text, "samples": 32, "max_length": 512, "batch_size": 2, "seed": 0}
    else:
        import torch

        program = lrc.capture(str(shared("stories260k")))
        given["calibration"] = [{"input_ids": torch.tensor([story[:512]])} for story in stories()[:4]]
    size = program.size()
    start, worked = time.perf_counter(), time.process_time()
    done = lrc.compile(program, document, cache=cache, **given)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    decided = done.plan.decisions
    share = sum(d.after.parameters for d in decided) / max(1, sum(d.before.parameters for d in decided))
    parameters, stored = done.program.size()
    return {
        "model": model, "method": method, "kept": kept, "perplexity": round(perplexity(model, done.program), 3),
        "targets_kept": round(share, 4), "parameters": parameters, "of": size[0], "mb": round(stored / 1e6, 2),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "cached": before, "peak_rss_mb": round(peak),
    }  # fmt: skip


def stories() -> list[list[int]]:
    """Return the ids of the sample stories."""
    found: list[list[int]] = json.loads((shared("stories260k") / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    return found


def perplexity(model: str, runner: Any) -> float:
    """Score as the benchmark of the model does."""
    if model == "smollm2":
        return float(importlib.import_module("bench_smollm2").perplexity(runner))
    return float(importlib.import_module("bench_stories260k").perplexity(runner, stories()))


def dense_row(model: str) -> dict[str, Any]:
    """Score the model as it is."""
    program = lrc.capture(str(smollm2() if model == "smollm2" else shared("stories260k")))
    parameters, stored = program.size()
    return {
        "model": model, "method": "dense", "kept": 1.0, "perplexity": round(perplexity(model, program), 3),
        "parameters": parameters, "of": parameters, "mb": round(stored / 1e6, 2),
    }  # fmt: skip


def in_own_process(model: str, method: str, kept: float) -> dict[str, Any]:
    """Run a row in a fresh interpreter; an error of it is the row."""
    row = {"model": model, "method": method, "kept": kept}
    done = subprocess.run([sys.executable, __file__, "--row", json.dumps(row)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return row | {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown for every model: a line a method, its columns the budgets."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "failed" not in row]
        budgets = sorted({row["kept"] for row in mine if row["method"] != "dense"}, reverse=True)
        lines += [
            "",
            f"{model}",
            "",
            "| solver | " + " | ".join(f"{kept:g}" for kept in budgets) + " | MB | CPU s | peak MB |",
        ]
        lines.append("|---" * (len(budgets) + 4) + "|")
        for method in dict.fromkeys(row["method"] for row in mine):
            at = {row["kept"]: row for row in mine if row["method"] == method}
            scores = [f"{at.get(kept, at.get(1.0, {})).get('perplexity', float('nan')):.2f}" for kept in budgets]
            sizes = " / ".join(f"{at[kept]['mb']:.1f}" for kept in sorted(at, reverse=True))
            cold = [row for row in at.values() if row.get("cached") is False]
            seconds = f"{max(row.get('cpu_seconds', row['seconds']) for row in cold):.0f}" if cold else ""
            peak = max((row.get("peak_rss_mb", 0) for row in at.values()), default=0)
            lines.append(f"| `{method}` | " + " | ".join(scores) + f" | {sizes} | {seconds} | {peak or ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories260k", "smollm2"], choices=["smollm2", "stories260k"])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to run")
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--rows", type=Path, default=WORK / "llm_solvers.json")
    parser.add_argument("--again", action="store_true", help="run rows that the file has already")
    parser.add_argument("--keep-caches", action="store_true", help="leave the statistics of every method on disk")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run_row(**json.loads(options.row))))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(options.rows.read_text()) if options.rows.is_file() else []

    def done(row: dict[str, Any]) -> None:
        same = ("model", "method", "kept")
        rows[:] = [r for r in rows if any(r[key] != row[key] for key in same)] + [row]
        options.rows.write_text(json.dumps(rows, indent=1))
        print(row, flush=True)

    there = set() if options.again else {(r["model"], r["method"], r["kept"]) for r in rows if "failed" not in r}
    for model in options.models:
        if (model, "dense", 1.0) not in there:
            done(dense_row(model))
        for method in options.only:
            if missing(method):
                print(f"{method}: this version has no such method", flush=True)
                continue
            cache = WORK / "llm_solvers" / f"{model}-{method}"
            if options.again:
                shutil.rmtree(cache, ignore_errors=True)
            for kept in options.kept:
                if (model, method, kept) not in there:
                    done(in_own_process(model, method, kept))
            if not options.keep_caches:
                shutil.rmtree(cache, ignore_errors=True)
    show("solvers for language models", rows)
    print(tables(rows))


if __name__ == "__main__":
    main()
