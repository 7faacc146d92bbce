"""Pretraining a small Llama from random weights on WikiText-2 text, for the same tokens, by method.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_pretrain.py [--methods adam galore fira …] [--finer]
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_pretrain.py --times [--methods adam galore fira …]

The model has 5.1 million numbers: 8 layers of width 192, and a byte-level BPE vocabulary of 4096 made on the training text. It
is trained on the first nine tenths of the WikiText-2 validation text, in windows of 128 tokens; the last tenth chooses the
learning rate of the blocks; the first 256 windows of the test text are scored with it. Every method gets the same grid of them,
0.001, 0.003 and 0.01, which goes on by threes where its best is at an end; embeddings and head learn at 0.005 by Adam in all
of them. Every run is a whole one, in a process of its own (`--one METHOD LR`).

adam: every weight, full Adam. galore, fira: the same weights, Adam in subspaces of rank 48 in the blocks, of rank 12 in
galore_small and fira_small; fira_orthogonal has the paper's residual G - P P'G, its code's G - scale P P'G is the default.
low_rank: every weight of a block as a product of rank 48, by Adam. sltrain: that, and 3 % of the entries on random supports.
sltrain_8bit: sltrain with states of 8 bits, updated in the backward pass, which excludes clipping. Megabytes: of the
parameters, all of which are trained, and of the optimiser's states, as in a checkpoint. A step: all that lives at its peak,
the weights included.
Results are kept in the benchmarks' folder (LRC_BENCH_DIR), and runs that are there are not repeated.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import WORK, shared, show

import lrc
from lrc.errors import LrcError
from lrc.program import Program

WIDTH, INNER, LAYERS, VOCABULARY, LENGTH, RANK = 192, 512, 8, 4096, 128, 48
STEPS, BATCH, GRID, MORE, WINDOWS = 150, 16, (1e-3, 3e-3, 1e-2), 3, 256
AROUND = 5e-3  # the learning rate of embeddings and head
BLOCKS, PLAIN = "layers:[0-9999]", ["**.embed_tokens.*", "lm_head.*"]
SPARSE = {"type": "sltrain", "density": 0.03, "start": "random", "alpha": 12.0}
FIRST: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"type": "factorize", "targets": [BLOCKS], "solver": "svd", "rank": RANK, "form": "two_factor"}],
    "sltrain": [{"type": "split", "targets": [BLOCKS], "solver": SPARSE, "rank": RANK}],
}
FIRST["sltrain_8bit"] = FIRST["sltrain"]
PROJECTED = {"update_proj_gap": 50, "ignore": PLAIN}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    f"{name}{end}": {"type": name, "rank": rank, **PROJECTED}
    for name in ("galore", "fira") for end, rank in (("", RANK), ("_small", RANK // 4))
} | {"sltrain_8bit": {"type": "adamw8bit"}}  # fmt: skip
OPTIMIZERS["fira_orthogonal"] = OPTIMIZERS["fira"] | {"residual": "orthogonal"}
OTHERS: dict[str, dict[str, Any]] = {
    "sltrain": {"recipe": "sltrain"}, "sltrain_8bit": {"recipe": "sltrain", "per_layer": True, "clip": None},
}  # fmt: skip
METHODS = (
    "adam", "galore", "fira", "fira_orthogonal", "galore_small", "fira_small", "low_rank", "sltrain", "sltrain_8bit",
)  # fmt: skip


def prepare() -> Path:
    """Return a folder with a config, a tokenizer and the texts, made once."""
    folder = WORK / "pretrain"
    if (folder / "config.json").is_file():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    lines = (shared("wikitext2") / "wiki.valid.tokens").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = 9 * len(lines) // 10
    (folder / "train.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    (folder / "choose.txt").write_text("".join(lines[cut:]), encoding="utf-8")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    made.train([str(folder / "train.txt")], trainer)
    names = ["input_ids"]
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", model_input_names=names).save_pretrained(
        folder
    )
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=2 * LENGTH,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@torch.no_grad()
def perplexity(program: Program, text: Path, folder: Path) -> float:
    """Return the perplexity per token on the first windows of a text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:WINDOWS]
    losses = []
    for batch in windows.split(16):
        logits = program(input_ids=batch)["logits"][:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


def one(method: str, lr: float, steps: int = STEPS) -> dict[str, Any]:
    """Train once and return what is measured; seconds are those of the processor."""
    folder = prepare()
    told: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "train":
            told.append(time.process_time())

    train = {
        "type": "train", "data": {"dataset": str(folder / "train.txt"), "max_length": LENGTH}, "objective": "causal_lm",
        "parameters": "all", "optimizer": {"type": "adamw"} | OPTIMIZERS.get(method, {}) | {"lr": lr},
        "schedule": {"type": "cosine", "warmup_ratio": 0.1, "final": 0.1}, "steps": steps, "batch_size": BATCH,
        "lr_factors": dict.fromkeys(PLAIN, AROUND / lr),
        "checkpoint_every": steps, **OTHERS.get(method, {}),
    }  # fmt: skip
    spec = {"version": 1, "model": {"init": "random"}, "passes": [*FIRST.get(method, []), train]}
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = lrc.compile(str(folder), spec, cache=Path(cache), progress=progress)
        except LrcError as error:  # a learning rate that is too large
            return {"method": method, "lr": lr, "failed": str(error)}
        (path,) = Path(cache).rglob("step-*.pt")
        kept = torch.load(path, weights_only=True)
    program = done.program
    if steps < STEPS:
        return {"method": method, "seconds_a_step": statistics.median(b - a for a, b in pairwise(told))}
    return {
        "method": method, "lr": lr, "parameters": program.size()[0],
        "choose": perplexity(program, folder / "choose.txt", folder),
        "perplexity": perplexity(program, shared("wikitext2") / "wiki.test.tokens", folder),
        "parameters_mb": size(kept["parameters"]) / 1e6, "states_mb": size(kept["optimizer"]) / 1e6,
        "step_mb": done.training[0]["memory"]["measured"] / 1e6,
        "seconds_a_step": statistics.median(b - a for a, b in pairwise(told)),
    }  # fmt: skip


def size(value: Any) -> int:
    """Return the bytes of all tensors in plain data."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(size(v) for v in inside)


def run(method: str, lr: float) -> dict[str, Any]:
    """Return a run from the folder of results, or make it in a process of its own."""
    path = WORK / "pretrain" / f"{method}-{lr:g}.json"
    if not path.is_file():
        command = [sys.executable, __file__, "--one", method, f"{lr:g}"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        path.write_text(told.splitlines()[-1], encoding="utf-8")
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return made


def times(methods: list[str], rounds: int = 3) -> list[dict[str, Any]]:
    """Return the time of a step of every method, the median over rounds of a few steps in turns, in processes of their own."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            command = [sys.executable, __file__, "--one", method, "1e-3", "--steps", "8"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[method].append(json.loads(told.splitlines()[-1])["seconds_a_step"])
    medians = {method: statistics.median(values) for method, values in found.items()}
    first = medians[methods[0]]
    return [{"method": m, "seconds_a_step": round(s, 3), f"over_{methods[0]}": round(s / first, 3)} for m, s in medians.items()]


def best(method: str, finer: bool) -> dict[str, Any]:
    """Return the run whose learning rate is best on the text that chooses, from a grid that goes on where that is at an end.

    finer: with the rates half-way to the neighbours of the best one.
    """
    rows = {lr: run(method, lr) for lr in GRID}
    for _ in range(MORE):
        ok = [lr for lr in sorted(rows) if "failed" not in rows[lr]]
        chosen = min(ok, key=lambda lr: float(rows[lr]["choose"]))
        if chosen not in (min(rows), max(rows)):
            break
        further = float(f"{chosen * 3 if chosen == max(rows) else chosen / 3:.0e}")
        rows[further] = run(method, further)
    if finer:
        done = [lr for lr, row in rows.items() if "failed" not in row]
        middle = min(done, key=lambda lr: float(rows[lr]["choose"]))
        rows |= {lr: run(method, lr) for lr in (float(f"{middle / 3**0.5:.1e}"), float(f"{middle * 3**0.5:.1e}"))}
    tried = {f"{lr:g}": row.get("choose", row.get("failed")) for lr, row in sorted(rows.items())}
    made = [row for row in rows.values() if "failed" not in row]
    return min(made, key=lambda row: float(row["choose"])) | {"tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--finer", action="store_true", help="the rates half-way to the neighbours of the best one too")
    parser.add_argument("--times", action="store_true", help="the time of a step alone, by methods in turns")
    parser.add_argument("--steps", type=int, default=STEPS, help="of --one")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LR"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one(given.one[0], float(given.one[1]), given.steps)))
        return
    prepare()
    if given.times:
        show("pretrain, time of a step", times(given.methods), tokens_a_step=BATCH * LENGTH, threads=1)
        return
    show("pretrain", [best(method, given.finer) for method in given.methods], tokens=STEPS * BATCH * LENGTH, threads=1)


if __name__ == "__main__":
    main()
