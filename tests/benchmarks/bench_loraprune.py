"""LoRAPrune against pruning before training, at equal steps of LoRA, and the memory that its scores need.

    python tests/benchmarks/bench_loraprune.py [--steps 100] [--seeds 0 1 2] [--pruned 0.25 0.5] [--lr 2e-3]
        [--schedule linear constant] [--ways loraprune …]
    python tests/benchmarks/bench_loraprune.py --memory

The model is stories260k, a Llama with grouped queries. It trains on 768 windows of 128 tokens that it wrote itself (sampled
once), and is judged by the perplexity of the five real stories of its folder. Every way ends at the same widths after the same
number of steps (25 % and 50 % of four keys are whole numbers; at 20 % the recipe keeps all heads, the others do not). The
recipe `loraprune` prunes while it trains, by its authors' schedule, `early` (within the first half of the steps) or `at once`
(within the first fifth), `by taylor` with `importance: taylor`; the others prune first, by scores on the same texts.

--memory: a random Llama with 57 million parameters in its linears, one text of 64 tokens, a process for every way. The peak of
the resident set over one backward pass of LoRA (rank 8) and the scores, less what was resident before: without scores, with
those of LoRAPrune, with `taylor`, and with those of the gradients of the weights themselves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_prune import CRITERIA, perplexity
from common import WORK, shared, show
from told import told

import lrc
from lrc.train.recipes.base import Context
from lrc.train.recipes.loraprune import LoraPruneRecipe, loraprune

LAYERS = ["layers:[0-9999]"]
ADAPT = {"type": "adapt", "targets": LAYERS, "method": "lora", "rank": 8, "alpha": 16}


def ways(gone: float, steps: int, seed: int, lr: float, schedule: str) -> Mapping[str, list[Any]]:
    """Return the passes of every way to the same widths."""
    train = {"type": "train", "objective": "causal_lm", "steps": steps, "batch_size": 4, "seed": seed,
             "schedule": schedule, "optimizer": {"type": "adamw", "lr": lr}}  # fmt: skip
    recipe = {"type": "loraprune", "width_kept": 1 - gone, "skip_first": 0.0, "skip_last": 0}
    found: dict[str, list[Any]] = {
        "loraprune": [ADAPT, {**train, "recipe": recipe}],
        "loraprune, early": [ADAPT, {**train, "recipe": {**recipe, "cooldown": 0.5}}],
        "loraprune, by taylor, early": [ADAPT, {**train, "recipe": {**recipe, "cooldown": 0.5, "importance": "taylor"}}],
        "loraprune, by taylor, at once": [
            ADAPT,
            {**train, "recipe": {**recipe, "cooldown": 0.8, "every": 2, "importance": "taylor"}},
        ],
    }
    for criterion in CRITERIA:
        method = {"type": "structured", "criterion": criterion, "amount": {"width_kept": 1 - gone}}
        found[criterion] = [{"type": "prune", "targets": LAYERS, "method": method}, ADAPT, train]
    return found


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    folder = shared("stories260k")
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    texts = torch.tensor(told(folder)).reshape(-1, 128)
    calibration = [{"input_ids": part} for part in texts.split(4)]
    program = lrc.capture(str(folder))
    rows: list[dict[str, Any]] = [{"way": "dense", "perplexity": round(perplexity(program, stories), 3)}]
    found: dict[tuple[float, str, str], list[float]] = {}
    sizes: dict[float, int] = {}
    for seed, gone, schedule in product(options.seeds, options.pruned, options.schedule):
        for way, passes in ways(gone, options.steps, seed, options.lr, schedule).items():
            if options.ways and way not in options.ways:
                continue
            start = time.process_time()
            done = lrc.compile(program, {"version": 1, "passes": passes}, calibration=calibration, cache=WORK / "cache")
            found.setdefault((gone, schedule, way), []).append(round(perplexity(done.program, stories), 3))
            size = sizes.setdefault(gone, done.plan.parameters[1])
            if size != done.plan.parameters[1]:
                raise SystemExit(f"{way} has {done.plan.parameters[1]} parameters, others {size}: choose a share that divides")
            cpu = time.process_time() - start
            said = f"{gone:g} {schedule} {way} seed {seed}: {found[gone, schedule, way][-1]}, {cpu:.0f} s of CPU"
            print(said, file=sys.stderr, flush=True)
    for (gone, schedule, way), values in found.items():
        rows.append({"way": way, "pruned": gone, "schedule": schedule, "perplexity": round(statistics.mean(values), 3),
                     "seeds": values, "parameters": sizes[gone]})  # fmt: skip
    return rows


def resident(word: str) -> int:
    """Return a line of this process's status in bytes: VmRSS (resident now), VmHWM (at most, since it was set back)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word + ":"))


def peak_of(way: str) -> dict[str, int]:
    """Return the peak of one backward pass and its scores, and what the gradients that are held take, in bytes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=12, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (1, 64))
    model = transformers.LlamaForCausalLM(config).eval()
    program = lrc.compile(model, {"version": 1, "passes": [ADAPT]}, inputs={"input_ids": ids}).program
    fqns = [fqn for fqn in program.sites if ".layers." in fqn]
    parameters = {name: p for name, p in program.graph_module.named_parameters() if p.requires_grad}
    context = Context(program, fqns, parameters, (), torch.optim.SGD(parameters.values()), 100, 100)
    importance: Any = "taylor" if way == "taylor" else "lora_guided"
    recipe: Any = loraprune(context, LoraPruneRecipe(importance=importance, width_kept=0.5, skip_first=0.0, skip_last=0))
    weights = [program.map_of(fqn).slots[0] for fqn in fqns]  # type: ignore[attr-defined]
    for weight in weights:
        weight.requires_grad_(way == "gradients")
    program(input_ids=ids)["logits"].sum().backward()  # what is made once, by the first pass, is not counted
    for held in (*parameters.values(), *weights):
        held.grad = None
    recipe.changes = {}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    logits = program(input_ids=ids)["logits"]
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    if way in ("loraprune", "taylor"):
        recipe.graded(0)
    if way == "gradients":
        for weight in weights:
            entries = (weight.detach() * weight.grad).abs()
            entries.sum(0), entries.sum(1)
    gradients = [p.grad.nbytes for p in (*parameters.values(), *weights) if p.grad is not None]
    return {"peak": resident("VmHWM") - before, "gradients": sum(gradients)}


def memory() -> list[dict[str, Any]]:
    """Run every way in a process of its own."""
    rows = []
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is no longer resident
    for way in ("none", "loraprune", "taylor", "gradients"):
        command = [sys.executable, __file__, "--peak", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"scores": way, **{f"{key}_mb": round(value / 1e6, 1) for key, value in found.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--schedule", nargs="*", default=["linear"], choices=["linear", "constant"])
    parser.add_argument("--ways", nargs="*", help="these alone")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", choices=["none", "loraprune", "taylor", "gradients"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak_of(options.peak)))
    elif options.memory:
        show("memory of LoRAPrune's scores", memory())
    else:
        rows = bench(options)
        show("LoRAPrune on stories260k", rows, steps=options.steps, lr=options.lr)


if __name__ == "__main__":
    main()
