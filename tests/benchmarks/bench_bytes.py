"""Quality against bytes: few bits, products, sums of the two, and `auto` at the same bytes as each of them.

    python tests/benchmarks/bench_bytes.py [--model minilm smollm2 stories260k] [--only nf4 'lq 4' …] [--seeds 3]
        [--auto 0.05 0.0625 …] [--plot bytes.svg] [--table bytes.md] [--no-auto]

MiniLM: Spearman on STS-B and "drift", how far the embeddings of its sentences went from the dense model's; SmolLM2-135M and
the stories260k Llama: perplexity. Targets are the linears of all blocks; "mb" is what they take, in 10^6 bytes, "share" of
what they took. Calibration as in `bench_minilm_quality.py` and `bench_smollm2.py`; of stories260k, windows of four stories,
scored on the fifth. Another draw for every seed. `auto` is given the bytes of every other way that was run (`auto = nf4`),
and the shares of `--auto`. The baseline is the dense model. Rows come seed by seed, each is printed when it is there and
appended to `bytes.jsonl` in the folder of the benchmarks; rows found there are not run again. Calibration and what `auto`
tries are done once a seed; a way without data (`free`) is the same for every draw, and run once.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_stories260k
import torch
from bench_minilm_quality import LAYERS, Drift, score, sentences
from bench_smollm2 import perplexity
from bytes_report import plot, scores_of, table
from common import WORK, minilm, shared, show, smollm2

import lrc

Steps = list[dict[str, Any]]
LOW: dict[str, Any] = {"rank": {"fraction": 0.0834}}
FACTORIZE: dict[str, Any] = {"type": "factorize", "solver": {"type": "kfac"}}
WHITENED: dict[str, Any] = {"type": "factorize", "solver": {"type": "whitened", "center": False}, "form": "two_factor"}


def codes(m: int, k: int, d: int, *, trained: bool = False) -> dict[str, Any]:
    """Return LR2VQ by the solver alone, log2(k) / m bits a number and the codebook, or what its recipe starts from."""
    solver = {"type": "lr2vq", "m": m} | ({"k": None} if trained else {"k": k, "iterations": 30, "choose": d == m})
    return {"type": "factorize", "solver": solver, "rank": d}


def recipe(assign: str) -> Steps:
    """Return the training of LR2VQ on the calibration data: no labels, and no more text than other ways have."""
    made = {"type": "train", "objective": "distillation", "optimizer": {"type": "adamw", "lr": 1e-3}, "steps": 100,
            "batch_size": 4, "recipe": {"type": "lr2vq", "k": 64, "assign": assign, "pretrain": 0.3}}  # fmt: skip
    return [made] if assign else []


WAYS: dict[str, Steps] = {
    "nf4": [{"type": "quantize", "format": "nf4"}],
    "nf3": [{"type": "quantize", "format": "nf3"}],
    "nf2": [{"type": "quantize", "format": "nf2"}],
    "nf4 feedback": [{"type": "quantize", "format": "nf4", "rounding": "feedback"}],
    "nf3 feedback": [{"type": "quantize", "format": "nf3", "rounding": "feedback"}],
    "nf2 feedback": [{"type": "quantize", "format": "nf2", "rounding": "feedback"}],
    "lr2vq 4": [codes(2, 256, 2)],
    "lr2vq 3": [codes(2, 64, 2)],
    "lr2vq 2": [codes(4, 256, 4)],
    **{
        f"lr2vq m{m} d{d} k64{how and f' {how}'}": [codes(m, 64, d, trained=bool(how)), *recipe(how)]
        for m, d in ((4, 3), (4, 4))
        for how in ("", "straight_through", "dkm")
    },
    "int8": [{"type": "quantize", "format": "int8"}],
    "int4": [{"type": "quantize", "format": "int4"}],
    "whitened 0.5": [WHITENED | {"rank": {"params_kept": 0.5}}],
    "whitened 0.3": [WHITENED | {"rank": {"params_kept": 0.3}}],
    "kfac 0.5": [FACTORIZE | {"rank": {"params_kept": 0.5}}],
    "lq 4": [{"type": "split", "solver": {"type": "lq", "bits": 4.0, "iterations": 10}, **LOW}],
    "lq 2.75": [{"type": "split", "solver": {"type": "lq", "bits": 2.75, "iterations": 10}, **LOW}],
    "loftq nf3": [{"type": "split", "solver": {"type": "loftq", "format": "nf3", "iterations": 5}, **LOW}],
    "kfac 0.5 + nf4": [FACTORIZE | {"rank": {"params_kept": 0.5}, "form": "two_factor"}, {"type": "quantize", "format": "nf4"}],
    "kfac 0.7 + nf4": [FACTORIZE | {"rank": {"params_kept": 0.7}, "form": "two_factor"}, {"type": "quantize", "format": "nf4"}],
    "oats 0.5": [
        {"type": "split", "solver": {"type": "oats", "iterations": 20}, "rank": {"params_kept": 0.5}, "rank_share": 0.25}
    ],
    "slim 2:4": [{"type": "split", "solver": {"type": "slim", "pattern": "2:4"}, **LOW}],
}
ASKED = ["nf4", "nf3", "nf2", "whitened 0.5", "lq 4", "lq 2.75", "oats 0.5"]  # by the issue that this is for
BESIDE = ["nf4 feedback", "nf3 feedback", "nf2 feedback", "lr2vq 4", "lr2vq 3", "lr2vq 2"]
FREE = ["nf4", "nf3", "nf2", "int8", "int4", "lq 4", "lq 2.75", "loftq nf3"]  # no data, and nothing drawn


@dataclass(frozen=True)
class Subject:
    """A model, what is compressed in it, how it is calibrated and scored."""

    program: Any
    targets: Sequence[str]
    fisher: str
    calibrate: Callable[[int], dict[str, Any]]
    scores: Callable[[Any], dict[str, float]]


def subject_of(name: str, folder: Path) -> Subject:
    if name == "minilm":
        texts = {"dataset": str(sentences(folder)), "samples": 256, "max_length": 128}
        dense = lrc.capture(str(minilm()))
        drift = Drift(dense, "dev")
        return Subject(dense, LAYERS, "outputs", lambda seed: {"calibration": texts | {"seed": seed}},
                       lambda program: {"quality": round(score(program, "dev"), 4),
                                        "drift": round(drift.of(program), 4)})  # fmt: skip
    if name == "smollm2":
        stream = {"dataset": str(shared("wikitext2/wiki.valid.tokens")), "samples": 32, "max_length": 512, "batch_size": 2}
        return Subject(lrc.capture(str(smollm2())), ["model.layers.**"], "labels",
                       lambda seed: {"calibration": stream | {"seed": seed}},
                       lambda program: {"quality": round(perplexity(program), 2)})  # fmt: skip
    source = shared("stories260k")
    stories = json.loads((source / "tinystories_sample_ids.json").read_text(encoding="utf-8"))

    def drawn(seed: int) -> dict[str, Any]:
        ids = [i for story in stories[:4] for i in story]
        starts = random.Random(seed).sample(range(len(ids) - 256), 8)
        return {"batches": [{"input_ids": torch.tensor([ids[start : start + 256]])} for start in starts]}

    return Subject(lrc.capture(str(source)), ["model.layers.**"], "labels", drawn,
                   lambda program: {"quality": round(bench_stories260k.perplexity(program, stories[4:]), 3)})  # fmt: skip


def measured(subject: Subject, steps: Steps, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    kfac = {"solver": {"type": "kfac", "fisher": subject.fisher}}
    of_kfac = [
        step.get("solver", {"type": "kfac"})["type"] == "kfac" and step["type"] in ("factorize", "auto") for step in steps
    ]
    passes = [
        {**step, "targets": list(subject.targets), **(kfac if weighs else {})}
        for step, weighs in zip(steps, of_kfac, strict=True)
    ]
    given = subject.calibrate(seed)
    spec = {"version": 1, "passes": passes} | {k: v for k, v in given.items() if k == "calibration"}
    extra = {"calibration": given["batches"]} if "batches" in given else {}
    done = lrc.compile(subject.program, spec, cache=WORK / "cache", **extra)
    seconds = time.perf_counter() - start
    first = [d for d in done.plan.decisions if d.index == 0]
    before = sum(d.before.bytes for d in first)
    after = sum(done.program.sites[fqn].map.cost().bytes for d in first for fqn in d.sites)
    row = {"mb": round(after / 1e6, 4), "share": after / before} | subject.scores(done.program)
    if steps[0]["type"] == "auto":
        chosen = [d.form or "kept" for d in first]
        row["options"] = {name: chosen.count(name) for name in sorted(set(chosen))}
        row["predicted"] = sum(d.predicted or 0.0 for d in first)
    biases = sum(done.program.sites[fqn].map.bias_cost(1).bytes for d in first for fqn in d.sites)
    return row | {"kept": (after - biases) / (before - biases), "seconds": round(seconds, 1)}


def auto(kept: float) -> Steps:
    return [{"type": "auto", "budget": {"bytes_kept": min(1.0, kept)}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["minilm"], choices=["minilm", "smollm2", "stories260k"])
    parser.add_argument("--only", nargs="*", default=ASKED + BESIDE, choices=list(WAYS))
    parser.add_argument("--auto", nargs="*", type=float, default=[], help="further shares of the bytes for auto")
    parser.add_argument("--no-auto", action="store_true", help="leave out auto at the bytes of every other way")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        runs = {model: Rows(model, subject_of(model, Path(name)), WORK / "bytes.jsonl") for model in options.model}
        for runner in runs.values():
            runner.dense()
        for seed in range(options.first, options.first + options.seeds):
            for model, runner in runs.items():
                for way in sorted(options.only, key=[*ASKED, *WAYS].index):
                    row = runner.way(way, seed)
                    if not options.no_auto:
                        runner.auto(f"auto = {way}", row["kept"], seed)
                for kept in options.auto:
                    runner.auto(f"auto {kept:g}", kept, seed)
                for score in scores_of(runner.rows) if options.plot else ():
                    path = beside(options.plot, model if score == "quality" else f"{model}-{score}")
                    path.write_text(plot(model, runner.rows, options.only, score), encoding="utf-8")
                if options.table:
                    beside(options.table, model).write_text(table(runner.rows), encoding="utf-8")
    for model, runner in runs.items():
        show(
            "quality against bytes",
            runner.rows,
            model=model,
            quality="Spearman (minilm), perplexity (others)",
            drift="distance of the embeddings from the dense model's, relative",
        )


def beside(path: Path, model: str) -> Path:
    return path.with_stem(f"{path.stem}-{model}")


class Rows:
    """The rows of one model: those of the log are read, others are run and logged."""

    def __init__(self, model: str, subject: Subject, log: Path) -> None:
        self.model, self.subject, self.log = model, subject, log
        known = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
        self.known = [row for row in known if row["model"] == model]
        self.rows: list[dict[str, Any]] = []

    def run(self, way: str, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = [row for row in self.known if row["way"] == way and row["seed"] == seed]
        if not found:
            found = [{"model": self.model, "way": way, "seed": seed} | make()]
            self.known += found
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[0]) + "\n")
        self.rows.append(found[0])
        print(found[0], flush=True)
        return found[0]

    def dense(self) -> None:
        subject = self.subject
        self.run(
            "dense", 0, lambda: {"share": 1.0, "mb": dense_mb(subject)} | subject.scores(subject.program)
        )  # fmt: skip

    def way(self, way: str, seed: int) -> dict[str, Any]:
        """Run a way; one without data for the first seed alone."""
        other = next((row for row in self.known if way in FREE and row["way"] == way), None)
        return self.run(way, seed, lambda: values(other) if other else measured(self.subject, WAYS[way], seed))

    def auto(self, way: str, kept: float, seed: int) -> dict[str, Any]:
        """Run `auto` at a share of the bytes, once for ways of the same size."""
        same = [row for row in self.known if row["way"].startswith("auto") and row["seed"] == seed and row.get("asked") == kept]
        return self.run(
            way, seed, lambda: values(same[0]) if same else {"asked": kept} | measured(self.subject, auto(kept), seed)
        )  # fmt: skip


def values(row: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of a row."""
    return {name: value for name, value in row.items() if name not in ("model", "way", "seed")}


def dense_mb(subject: Subject) -> float:
    from lrc.spec.patterns import Candidate, select

    program = subject.program
    names = select([Candidate(s.fqn, s.type_name) for s in program.sites.values()], list(subject.targets), []).rules
    return round(sum(program.sites[fqn].map.cost().bytes for fqn in names) / 1e6, 4)


if __name__ == "__main__":
    main()
