"""Time and peak memory of inserting every adapter method in MiniLM and of one training step, beside PEFT where it can.

    python tests/benchmarks/bench_adapters.py [--methods lora dora …] [--rounds 9] [--rank 8] [--batch 8] [--length 64]

Rounds are interleaved: ours, PEFT's, ours, … of one method, so that a slow spell of the machine favours neither; `ratio` is the
median over rounds of ours / PEFT's. Insertion is timed from a captured program (ours) and from a loaded model (PEFT); the
capture, which every pass shares and PEFT does not need, is a row of its own. Peak memory is the growth of the resident set in a
fresh process per measurement. A step is forward, backward and SGD of the adapter in train mode with all dropouts at zero.
"""

import argparse
import copy
import json
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
    return lrc.compile(program.clone(), spec_for(name, rank, data), cache=cache)


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


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns, the order reversed every other round; one round before to warm up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(what: str, times: dict[str, list[float]]) -> dict[str, Any]:
    row = {f"{what}_{name}_ms": round(1e3 * statistics.median(found), 2) for name, found in times.items()}
    if "peft" in times:
        ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["peft"], strict=True)]
        row[f"{what}_ratio"] = round(statistics.median(ratios), 3)
    return row


def measure(name: str, options: argparse.Namespace, program: Any, model: Any, data: Path, cache: Path) -> dict[str, Any]:
    """Times of one method."""
    made = insert_ours(program, name, options.rank, data, cache)
    trained = sum(p.numel() for p in made.program.graph_module.parameters() if p.requires_grad)
    row: dict[str, Any] = {"method": name, "trained": trained, "sites": len(made.program.maps)}
    copies = iter([copy.deepcopy(model) for _ in range(options.rounds + 2)] if name in PEFT else [])  # PEFT changes its model
    inserting: dict[str, Callable[[], Any]] = {
        "ours": lambda: insert_ours(program, name, options.rank, data, Path(tempfile.mkdtemp(dir=cache)))
    }
    if name in PEFT:
        inserting["peft"] = lambda: insert_theirs(next(copies), name, options.rank)
    row |= summary("insert", interleaved(inserting, options.rounds))
    batch = batch_of(options.batch, options.length)
    stepping = {"ours": stepper(made.graft(), batch)}
    if name in PEFT:
        theirs = insert_theirs(copy.deepcopy(model), name, options.rank)
        row["trained_peft"] = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        stepping["peft"] = stepper(theirs, batch)
    return row | summary("step", interleaved(stepping, options.rounds))


def memory(name: str, options: argparse.Namespace, who: str) -> float:
    """Megabytes by which a fresh process grows when a method is inserted and trained for one step."""
    words = [sys.executable, __file__, "--memory-of", who, "--methods", name, "--rank", str(options.rank)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def memory_here(name: str, options: argparse.Namespace, data: Path, cache: Path) -> float:
    batch = batch_of(options.batch, options.length)
    if options.memory_of == "ours":
        program = lrc.capture(str(minilm()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = insert_ours(program, name, options.rank, data, cache).graft()
    else:
        from lrc.program.huggingface import load_folder

        held = load_folder(minilm())[0]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = insert_theirs(held, name, options.rank)
    stepper(model, batch)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=methods())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "peft"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = sentences(folder)
        if options.memory_of:
            print(json.dumps(memory_here(options.methods[0], options, data, folder)))
            return
        start = time.perf_counter()
        program = lrc.capture(str(minilm()))
        captured = time.perf_counter() - start
        model = program.origin.model
        rows = []
        for name in options.methods:
            row = measure(name, options, program, model, data, folder)
            if not options.no_memory:
                row["memory_ours_mb"] = round(memory(name, options, "ours"), 1)
                if name in PEFT:
                    row["memory_peft_mb"] = round(memory(name, options, "peft"), 1)
            rows.append(row)
        show("adapters", rows, capture_seconds=round(captured, 2), batch=options.batch, length=options.length)


if __name__ == "__main__":
    main()
