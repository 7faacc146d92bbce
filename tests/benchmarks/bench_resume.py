"""`lrc compile` of MiniLM killed at a random moment, five times in a row, then resumed: the same bytes as an undisturbed run.

    python tests/benchmarks/bench_resume.py [--kills 5] [--seed 0] [--train]

Compares model.safetensors, the plan and the ONNX file of the resumed run with those of a run without a kill, and prints when
each kill came and how long the whole job took to HF + ONNX. With `--train` the job is training: the stories260k Llama,
factorized, then all of its parameters trained on its sample stories by Fira with a validation; every kill comes at a
random moment after another checkpoint, and the losses of all steps must be the same numbers too.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import ROOT, WORK, shared, show

FILES = ("model.safetensors", "lrc/plan.json", "onnx/model.onnx")


def command(output: Path, cache: Path) -> list[str]:
    spec = str(ROOT / "examples" / "minilm.yaml")
    exports = "export=[{format: hf},{format: onnx}]"
    return [sys.executable, "-m", "lrc.cli", "compile", spec, exports, "-o", str(output), "--cache", str(cache), "--quiet"]


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def run(output: Path, cache: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command(output, cache), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def written(place: Path) -> Path:
    """Write data and spec of the training, and return the spec."""
    folder = shared("stories260k")
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    windows = np.array([story[i : i + 64] for story in stories for i in range(0, len(story) - 63, 16)])
    np.savez(place / "train.npz", input_ids=windows[:-8])
    np.savez(place / "held.npz", input_ids=windows[-8:])
    learn = {
        "type": "train", "data": "train.npz", "objective": "causal_lm", "parameters": "all", "steps": 160, "batch_size": 4,
        "optimizer": {"type": "fira", "rank": 8, "update_proj_gap": 30}, "checkpoint_every": 8,
        "validation": {"data": "held.npz", "every": 20},
    }  # fmt: skip
    squeeze = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.6}, "form": "two_factor"}
    spec = place / "spec.yaml"
    spec.write_text(json.dumps({"version": 1, "model": {"path": str(folder)}, "passes": [squeeze, learn]}), encoding="utf-8")
    return spec


def steps_done(cache: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in cache.glob("**/train/*/step-*.pt")), default=0)


def trained(place: Path, kills: int, generator: random.Random) -> None:
    """Kill a training as often as asked, resume it, and compare it with one that was left alone."""
    spec = written(place)

    def start(name: str) -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-m", "lrc.cli", "compile", str(spec), "-o", str(place / name), "--quiet"]
        return subprocess.Popen([*words, "--cache", str(place / f"cache-{name}")], stdout=subprocess.DEVNULL)

    begun = time.perf_counter()
    if start("undisturbed").wait():
        raise SystemExit("the undisturbed run failed")
    whole = time.perf_counter() - begun
    rows: list[dict[str, object]] = []
    for kill in range(kills):
        before = steps_done(place / "cache-killed")
        process = start("killed")
        while process.poll() is None and steps_done(place / "cache-killed") <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        if process.poll() is not None:
            raise SystemExit("the run ended before the kill: give it more steps")
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows.append({"kill": kill + 1, "went_on_from": before, "last_checkpoint": steps_done(place / "cache-killed")})
        print(rows[-1], flush=True)
    if start("killed").wait():
        raise SystemExit("the resumed run failed")
    same = {
        name: (place / "undisturbed" / name).read_bytes() == (place / "killed" / name).read_bytes()
        for name in ("model.safetensors", "lrc/plan.json")
    }
    told = [json.loads((place / name / "lrc/manifest.json").read_text())["training"] for name in ("undisturbed", "killed")]
    same["losses of all steps"] = told[0][0]["history"] == told[1][0]["history"]
    show(
        "kill and resume of training", rows, undisturbed_seconds=round(whole, 1), steps=len(told[0][0]["history"]),
        losses=[told[0][0]["history"][i]["loss"] for i in (0, -1)], best_step=told[0][0]["best_step"], same=same,
    )  # fmt: skip
    if not all(same.values()):
        raise SystemExit("the resumed run differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="kill a training run")
    options = parser.parse_args()
    place = WORK / ("resume-train" if options.train else "resume")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if options.train:
        trained(place, options.kills, random.Random(options.seed))
        return
    whole = run(place / "undisturbed", place / "cache-a")
    again = run(place / "again", place / "cache-a")
    generator = random.Random(options.seed)
    rows: list[dict[str, object]] = []
    while len(rows) < options.kills:
        delay = generator.uniform(0.1, 0.9) * again
        process = subprocess.Popen(
            command(place / "killed", place / "cache-b"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            staged = sorted(p.name for p in place.iterdir() if p.name.startswith(".killed"))
            rows.append({"kill": len(rows) + 1, "after_seconds": round(delay, 1), "left_behind": staged})
            print(rows[-1], flush=True)
        else:  # it was faster than the kill: that is none, and what it made would be no resumed run
            shutil.rmtree(place / "killed")
    resumed = run(place / "killed", place / "cache-b")
    wanted, found = hashes(place / "undisturbed"), hashes(place / "killed")
    same = {name: wanted[name] == found[name] for name in FILES}
    show(
        "kill and resume of lrc compile", rows, undisturbed_seconds=round(whole, 1), with_cache_seconds=round(again, 1),
        resumed_seconds=round(resumed, 1), same_bytes=same,
    )  # fmt: skip
    if not all(same.values()):
        raise SystemExit("the resumed run differs")


if __name__ == "__main__":
    main()
