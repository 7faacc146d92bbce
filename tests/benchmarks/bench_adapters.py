"""Time and peak memory of inserting every adapter method in MiniLM and of one training step, beside PEFT where it can.

    python tests/benchmarks/bench_adapters.py [--methods lora dora …] [--rounds 15] [--rank 8] [--batch 8] [--length 32]

Insertion is timed from a captured program to a module that can be trained (ours: `lrc.compile(program, spec).module`, which
leaves the program as it was) and from a loaded model to one that can be trained (PEFT: `get_peft_model(model, config)`, which
changes it). The capture, which all passes share and PEFT does not need, is told once. Times are CPU time of this process, in
interleaved rounds: ours, PEFT's, PEFT's, ours, …, so that a slow spell of the machine favours neither; `ratio` is the median
over rounds of ours / PEFT's. Peak memory is the growth of the resident set in a process of its own, insertion and one step
together. A step is forward, backward and SGD of the adapter in train mode with all dropouts at zero.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import LAYERS, sentences
from common import minilm, show

import lrc
from lrc.spec.registry import ADAPTERS

NAMES = r"encoder\.layer\..*\.(query|key|value|dense)"  # of PEFT: the same linears; both sides leave the pooler out
PEFT: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "vera": {},
    "lora gaussian": {"init_lora_weights": "gaussian"}, "lora pissa": {"init_lora_weights": "pissa"},
    "lora pissa niter": {"init_lora_weights": "pissa_niter_4"}, "lora olora": {"init_lora_weights": "olora"},
    "lora orthogonal": {"init_lora_weights": "orthogonal"},
}  # fmt: skip
INITS: dict[str, Any] = {
    "gaussian": "gaussian", "pissa": "pissa", "pissa niter": {"type": "pissa", "niter": 4}, "olora": "olora",
    "orthogonal": "orthogonal", "eva": "eva", "corda": "corda", "loftq": "loftq", "lora_ga": "lora_ga", "lora_sb": "lora_sb",
}  # fmt: skip


def methods() -> list[str]:
    """Every method as it is by default, and plain LoRA with every initialiser."""
    return [*(rule.name for rule in ADAPTERS), *(f"lora {init}" for init in INITS)]


def spec_for(name: str, rank: int, data: Path) -> dict[str, Any]:
    method, _, init = name.partition(" ")
    made: dict[str, Any] = {"type": "adapt", "targets": LAYERS, "method": method, "optional": True}
    if method in ("lora", "rslora", "dora", "vera"):
        made["rank"] = 256 if method == "vera" else rank
    if init:
        made["init"] = INITS[init]
    return {
        "version": 1, "passes": [made],
        "calibration": {"dataset": str(data), "samples": 64, "max_length": 64, "batch_size": 16},
    }  # fmt: skip


def insert_ours(program: Any, name: str, rank: int, data: Path, cache: Path) -> Any:
    return lrc.compile(program, spec_for(name, rank, data), cache=cache)


def insert_theirs(model: Any, name: str, rank: int) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "vera":
            return peft.get_peft_model(model, peft.VeraConfig(r=256, target_modules=NAMES))
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=NAMES, **PEFT[name])
        return peft.get_peft_model(model, config)


def batch_of(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def stepper(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One step: the mean square of the last hidden state is as good a loss as any for its time."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch)[0].square().mean().backward()
        optimizer.step()

    return step


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of every call, in turns, the order reversed every other round; one round before to warm up.

    No more rounds than fit into `seconds`, at least one. Garbage of earlier calls is collected before a call, not within it.
    """
    started = time.process_time()
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        if turn and time.process_time() - started > seconds:
            break
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            gc.collect()
            gc.disable()
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
            gc.enable()
    return times


def summary(what: str, times: dict[str, list[float]]) -> dict[str, Any]:
    row = {f"{what}_{name}_ms": round(1e3 * statistics.median(found), 1) for name, found in times.items()}
    if "peft" in times:
        ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["peft"], strict=True)]
        row[f"{what}_ratio"] = round(statistics.median(ratios), 3)
    return row | {f"{what}_rounds": len(times["ours"])}


def measure(name: str, options: argparse.Namespace, program: Any, model: Any, data: Path, cache: Path) -> dict[str, Any]:
    """Times of one method. An insertion that takes longer than all rounds may is timed once, without a round to warm up."""
    start = time.process_time()
    made = insert_ours(program, name, options.rank, data, cache)
    first = time.process_time() - start
    trained = sum(p.numel() for p in made.program.graph_module.parameters() if p.requires_grad)
    row: dict[str, Any] = {"method": name, "trained": trained, "sites": len(made.program.maps)}
    copies = iter([copy.deepcopy(model) for _ in range(options.rounds + 2)] if name in PEFT else [])  # PEFT changes its model
    inserting: dict[str, Callable[[], Any]] = {
        "ours": lambda: insert_ours(program, name, options.rank, data, Path(tempfile.mkdtemp(dir=cache))).module
    }
    if name in PEFT:
        inserting["peft"] = lambda: insert_theirs(next(copies), name, options.rank)
    once = first > options.seconds and name not in PEFT
    row |= summary("insert", {"ours": [first]} if once else interleaved(inserting, options.rounds, options.seconds))
    batch = batch_of(options.batch, options.length)
    stepping = {"ours": stepper(made.graft(), batch)}
    if name in PEFT:
        theirs = insert_theirs(copy.deepcopy(model), name, options.rank)
        row["trained_peft"] = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        stepping["peft"] = stepper(theirs, batch)
    return row | summary("step", interleaved(stepping, options.rounds, options.seconds))


def timed(name: str, *args: Any) -> dict[str, Any]:
    """Times of one method, and how long that took, to the terminal."""
    start = time.process_time()
    row = measure(name, *args)
    print(f"{name}: {time.process_time() - start:.1f} s of CPU", file=sys.stderr)
    return row


def memories(options: argparse.Namespace, data: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Megabytes by which a process grows when a method is inserted and trained for one step, ours and PEFT's.

    Every measurement is a child of one process that has loaded and captured the model and done nothing else.
    """
    warm(cache)
    program = lrc.capture(str(minilm()))
    found: dict[str, dict[str, float]] = {}
    for name in options.methods:
        found[name] = {}
        for who in ("ours", "peft") if name in PEFT else ("ours",):
            result = Path(tempfile.mkdtemp(dir=cache)) / "grown"
            child = os.fork()
            if child == 0:
                result.write_text(str(grown(program, name, who, options, data, cache)))
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                found[name][f"memory_{who}_mb"] = round(float(result.read_text()), 1)
    return found


def warm(cache: Path) -> None:
    """Import, with one small linear, whatever either side imports late: code is no memory of a method."""
    import peft

    x = torch.ones(2, 4)
    small = torch.nn.Sequential(torch.nn.Linear(4, 4))
    made = lrc.compile(small, {"version": 1, "passes": [{"type": "adapt", "rank": 1}]}, inputs={"input": x}, cache=cache)
    theirs = peft.get_peft_model(small, peft.LoraConfig(r=1, target_modules=["0"]))
    for model in (made.module, theirs):
        model(x).sum().backward()


def grown(program: Any, name: str, who: str, options: argparse.Namespace, data: Path, cache: Path) -> float:
    """Insert and train one step; return by how many megabytes the resident set has grown at its peak."""
    with contextlib.ExitStack() as errors:
        errors.callback(os._exit, 1)  # a child that fails runs nothing of its parent's
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if who == "ours":
            model = insert_ours(program, name, options.rank, data, Path(tempfile.mkdtemp(dir=cache))).module
        else:
            model = insert_theirs(program.origin.model, name, options.rank)
        stepper(model, batch_of(options.batch, options.length))()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        errors.pop_all()
    return (peak - before) / 2**20


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    heads = {
        "method": "method", "trained": "trained", "insert_ours_ms": "insert ms", "insert_peft_ms": "PEFT",
        "insert_ratio": "ratio",
        "step_ours_ms": "step ms", "step_peft_ms": "PEFT", "step_ratio": "ratio", "memory_ours_mb": "peak MB",
        "memory_peft_mb": "PEFT",
    }  # fmt: skip
    lines = [list(heads.values()), *([str(row.get(key, "-")) for key in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=methods())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="of CPU, at most, for the rounds of one measurement")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the table")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = sentences(folder)
        if options.memory_only:
            print(json.dumps(memories(options, data, folder)))
            return
        words = [sys.executable, __file__, "--memory-only", *sys.argv[1:]]
        memory = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        start = time.process_time()
        program = lrc.capture(str(minilm()))
        captured = time.process_time() - start
        model = program.origin.model
        rows = [timed(name, options, program, model, data, folder) | memory[name] for name in options.methods]
    if options.json:
        show("adapters", rows, capture_seconds=round(captured, 2), batch=options.batch, length=options.length)
        return
    print(f"batch {options.batch}, length {options.length}, rank {options.rank}; CPU time; capture, once: {captured:.2f} s")
    print(table(rows))


if __name__ == "__main__":
    main()
