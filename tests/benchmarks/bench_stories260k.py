"""The stories260k Llama: perplexity on its sample stories against the parameters kept, and generation with and without cache.

    python tests/benchmarks/bench_stories260k.py [--kept 0.9 0.8 0.7 0.6 0.5]

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

SOLVERS: dict[str, Any] = {
    "kfac": ({"type": "kfac", "fisher": "labels"}, "auto"),
    "whitened": ({"type": "whitened", "center": False}, "two_factor"),
    "svd": ({"type": "svd"}, "two_factor"),
}


def perplexity(runner: Any, stories: list[list[int]]) -> float:
    total, count = 0.0, 0
    for story in stories:
        ids = torch.tensor([story[:512]])
        logits = runner(input_ids=ids)["logits"]
        total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").detach())
        count += ids.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    options = parser.parse_args()
    folder = shared("stories260k")
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    program = lrc.capture(str(folder))
    calibration = [{"input_ids": torch.tensor([story[:512]])} for story in stories[:4]]
    prompt = torch.tensor([stories[4][:8]])
    rows: list[dict[str, Any]] = [{"solver": "dense", "kept": 1.0, "perplexity": round(perplexity(program, stories), 3)}]
    for kept in options.kept:
        for name, (solver, form) in SOLVERS.items():
            done = lrc.compile(
                program,
                {
                    "version": 1,
                    "passes": [
                        {
                            "type": "factorize",
                            "targets": ["model.layers.**"],
                            "solver": solver,
                            "rank": {"params_kept": kept},
                            "form": form,
                        }
                    ],
                },
                calibration=calibration,
                cache=WORK / "cache",
            )
            model: Any = done.graft()
            settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
            cached = model.generate(prompt, use_cache=True, **settings)
            plain = model.generate(prompt, use_cache=False, **settings)
            rows.append({
                "solver": name, "kept": kept, "form": form, "perplexity": round(perplexity(done.program, stories), 3),
                "generate_equal_with_and_without_cache": bool(torch.equal(cached, plain)),
            })  # fmt: skip
            print(rows[-1], flush=True)
    show("perplexity of stories260k", rows)


if __name__ == "__main__":
    main()
