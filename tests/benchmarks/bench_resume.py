"""`lrc compile` of MiniLM killed at a random moment, five times in a row, then resumed: the same bytes as an undisturbed run.

    python tests/benchmarks/bench_resume.py [--kills 5] [--seed 0]

Compares model.safetensors, the plan and the ONNX file of the resumed run with those of a run without a kill, and prints when
each kill came and how long the whole job took to HF + ONNX.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, WORK, show

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = WORK / "resume"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
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
