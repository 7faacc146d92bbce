"""The stories260k Llama: perplexity on its sample stories against the parameters kept, and generation with and without cache.

    python tests/benchmarks/bench_stories260k.py [--kept 0.9 0.8 0.7 0.6 0.5] [--methods kfac dobi slice …]

Calibrated on the first four stories, scored on all five (each cut at 512 ids, as in the reference value 3.548 of the dense
model). Baselines: plain SVD and whitened SVD at the same size. `generate()` of every compiled model must give the same tokens
with and without its key-value cache.
"""

import argparse
import json
import math
from typing import Any

import torch
from common import WORK, shared, show
from torch.nn import functional as F

import lrc

LEARNED = {"type": "learned", "steps": 64}
FACTORIZE: dict[str, dict[str, Any]] = {
    "kfac": {"solver": {"type": "kfac", "fisher": "labels"}},
    "kfac_learned": {"solver": {"type": "kfac", "fisher": "labels"}, "allocate": LEARNED},
    "dobi": {"solver": "dobi", "allocate": LEARNED},
    "dobi_two_factor": {"solver": "dobi", "allocate": LEARNED, "form": "two_factor"},
    "dobi_uniform": {"solver": "dobi", "allocate": "uniform"},
    "whitened": {"solver": {"type": "whitened", "center": False}, "form": "two_factor"},
    "svd": {"solver": "svd", "form": "two_factor"},
}
PASSES: dict[str, dict[str, Any]] = {name: {"type": "factorize", **options} for name, options in FACTORIZE.items()} | {
    "slice": {"type": "slice", "round_to": 1},
    "slice_residual": {"type": "slice", "round_to": 1, "signals": "residual"},
    "slice_block": {"type": "slice", "round_to": 1, "bases": "block"},
    "slice_block_residual": {"type": "slice", "round_to": 1, "bases": "block", "signals": "residual"},
}


def perplexity(runner: Any, stories: list[list[int]]) -> float:
    total, count = 0.0, 0
    for story in stories:
        ids = torch.tensor([story[:512]])
        logits = runner(input_ids=ids)["logits"]
        total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").detach())
        count += ids.shape[1] - 1
    return math.exp(total / count)


def generated(done: lrc.Compiled, prompt: torch.Tensor) -> dict[str, bool]:
    """Say whether a result that has a place in the model's own modules generates the same with and without a cache."""
    if done.program.inserted:
        return {}
    model: Any = done.graft()
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=cache, **settings) for cache in (True, False))
    return {"generate_equal_with_and_without_cache": bool(torch.equal(cached, plain))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", default=["kfac", "whitened", "svd"], choices=list(PASSES))
    options = parser.parse_args()
    folder = shared("stories260k")
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    program = lrc.capture(str(folder))
    calibration = [{"input_ids": torch.tensor([story[:512]])} for story in stories[:4]]
    prompt = torch.tensor([stories[4][:8]])
    rows: list[dict[str, Any]] = [{"method": "dense", "kept": 1.0, "perplexity": round(perplexity(program, stories), 3)}]
    for kept in options.kept:
        for name in options.methods:
            done = lrc.compile(
                program,
                {
                    "version": 1,
                    "passes": [{"targets": ["model.layers.**"], "rank": {"params_kept": kept}, **PASSES[name]}],
                },
                calibration=calibration,
                cache=WORK / "cache",
            )
            row = {"method": name, "kept": kept, "perplexity": round(perplexity(done.program, stories), 3)}
            row["perplexity_unseen"] = round(perplexity(done.program, stories[4:]), 3)
            rows.append({**row, "notes": done.plan.notes, **generated(done, prompt)})
            print(rows[-1], flush=True)
    show("perplexity of stories260k", rows)


if __name__ == "__main__":
    main()
