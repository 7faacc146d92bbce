"""Structured pruning by half: speed against a dense model of that width, the masked model, and quality.

    python tests/benchmarks/bench_prune.py [--models minilm stories260k gpt2 smollm2] [--kept 0.5] [--no-speed]

`difference` is the largest one between the outputs of the pruned model and of the dense one with zeros in those places,
relative to the largest output. The dense model of that width is the pruned one with torch's own layers of the same sizes;
speed is eager and ONNX Runtime, one thread, as the ratio of the medians of interleaved runs in CPU time (1: as fast; the bar
is 0.95). `tokens` says whether `generate` of the pruned and of the masked model say the same; other tokens or a difference
above 1e-4 end the run with an error.
stories260k: perplexity of its five stories, calibrated on texts that it wrote itself. minilm: Spearman on the dev split of
STS-B, calibrated on 256 sentences. smollm2: perplexity of two windows of 512 tokens of WikiText-2, calibrated on 16 windows,
one criterion. gpt2: a random model of 4 layers, since no weights of one are at hand. ResNet-20: bench_prune_images.py.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import score
from common import ROOT, WORK, minilm, shared, show, smollm2
from lrc_passes.pruners import structured
from told import told
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.lower.ort import OrtRunner
from lrc.maps import Conv, Dense
from lrc.program.capture import capture_module
from lrc.program.dependency import cut_units
from lrc.program.graft import graft

sys.path.append(str(ROOT / "tests" / "prune"))
from nets import masked  # the model with zeros, as the tests have it

ROUNDS = 40
AGREES = 1e-4
CRITERIA = ("magnitude", "wanda", "taylor")


def stock(model: nn.Module) -> nn.Module:
    """Return the module with torch's own layers in the place of dense maps and convolutions, of the same numbers."""
    for name, made in list(model.named_modules()):
        if isinstance(made, Dense):
            new: nn.Module = nn.Linear(made.in_features, made.out_features, made.bias is not None)
        elif isinstance(made, Conv):
            g, (out, read, *kernel) = made.geometry, made.weight.shape
            new = nn.Conv2d(
                read * g.groups, out, tuple(kernel), g.stride, g.padding, g.dilation, g.groups, made.bias is not None  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            continue
        new.load_state_dict(made.state_dict())
        model.set_submodule(name, new)
    return model.eval()


def ratio(ours: Callable[[], Any], dense: Callable[[], Any]) -> float:
    """Return how much faster the first of two runs is: CPU time of this thread, medians of interleaved runs."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS):
        for run, kept in zip((ours, dense), times, strict=True) if turn % 2 else ((dense, times[1]), (ours, times[0])):
            start = time.thread_time()
            run()
            kept.append(time.thread_time() - start)
    return round(statistics.median(times[1]) / statistics.median(times[0]), 3)


@torch.no_grad()
def speed(done: lrc.Compiled, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the speed of a pruned model over that of a dense one of its width: eager, and ONNX Runtime."""
    ours, dense = done.graft().eval(), stock(done.graft())
    fixed = {"use_cache": False} if hasattr(ours, "config") else {}
    found = {"eager": ratio(lambda: ours(**inputs, **fixed), lambda: dense(**inputs, **fixed))}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "pruned" / "model.onnx", Path(folder) / "dense" / "model.onnx"]
        for path in paths:
            path.parent.mkdir()
        done.to_onnx(paths[0], cache=False if fixed else None)
        given = done.program.inputs
        twin = capture_module(dense, dict(given.examples), dynamic=given.dynamic, largest=given.largest, constants=fixed)
        lrc.compile(twin, {"version": 1, "passes": [{"type": "merge", "optional": True}]}).to_onnx(
            paths[1], cache=False if fixed else None
        )
        runners = [OrtRunner(path, threads=1) for path in paths]
        arrays = {name: value.numpy() for name, value in inputs.items()}
        outputs = [next(iter(runner(**arrays).values())) for runner in runners]
        found["onnx_difference"] = float(f"{abs(outputs[0] - outputs[1]).max() / abs(outputs[1]).max():.1e}")
        found["onnx"] = ratio(lambda: runners[0](**arrays), lambda: runners[1](**arrays))
    return found


def prune(program: Any, calibration: Any, amount: Mapping[str, float], criterion: str, **options: Any) -> lrc.Compiled:
    step = {"type": "prune", "targets": options.pop("targets", ["**"])}
    method = {"type": "structured", "criterion": criterion, "amount": dict(amount), **options.pop("method", {})}
    spec = {"version": 1, "passes": [{**step, "method": method}, *options.pop("then", [])]}
    return lrc.compile(program, spec, calibration=calibration, cache=WORK / "cache", **options)


@torch.no_grad()
def checked(make: Callable[[], lrc.Compiled], inputs: Mapping[str, Tensor]) -> tuple[lrc.Compiled, dict[str, Any]]:
    """Prune, and return how far the result is from the same model with zeros, in outputs and in tokens."""
    kept: list[Any] = []

    def watched(program: Any, groups: Any, gone: Any, by: str) -> list[str]:
        kept.append(masked(program, groups, gone))
        return cut_units(program, groups, gone, by)

    structured.cut_units = watched
    try:
        done = make()
    finally:
        structured.cut_units = cut_units
    ours, zeros = (next(iter(run(**inputs).values())) for run in (done.program, kept[0]))
    found: dict[str, Any] = {"difference": float(f"{float((ours - zeros).abs().max() / zeros.abs().max()):.1e}")}
    if done.program.task == "text-generation":
        models = (done.graft().eval(), graft(kept[0]).eval())
        told = [m.generate(inputs["input_ids"][:, :12], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
                for m in models]  # fmt: skip
        found["tokens"] = bool((told[0] == told[1]).all())
    if found["difference"] > AGREES or not found.get("tokens", True):
        raise SystemExit(f"the pruned model is not the masked one: {found}")
    return done, found


def row(**found: Any) -> dict[str, Any]:
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def bench_folder(name: str, kept: float, timed: bool) -> list[dict[str, Any]]:
    if name == "gpt2":
        import transformers

        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=8, n_positions=256)
        model = transformers.GPT2LMHeadModel(config).eval()
        folder = WORK / "gpt2_random"
        model.save_pretrained(folder)
    else:
        folder = {"minilm": minilm, "smollm2": smollm2}[name]() if name in ("minilm", "smollm2") else shared(name)
    program = lrc.capture(str(folder))
    ids = torch.randint(3, 400, (1, 128), generator=torch.Generator().manual_seed(0))
    inputs = {key: (ids if key == "input_ids" else torch.ones_like(ids) if key == "attention_mask" else torch.zeros_like(ids))
              for key in program.inputs.examples}  # fmt: skip
    rows = [row(model=name, way="dense", **quality(name, program, folder))]
    given = CALIBRATED[name](folder) if name in CALIBRATED else None
    for criterion in ("wanda",) if name == "smollm2" else CRITERIA if name in CALIBRATED else CRITERIA[:1]:
        for allocate in ("uniform",) if name in ("smollm2", "gpt2") else ("uniform", "global"):
            options = {"targets": ["layers:[0-9999]"], "method": {"allocate": allocate}}
            done, more = checked(lambda: prune(program, given, {"params_kept": kept}, criterion, **options), inputs)  # noqa: B023
            if timed and allocate == "uniform" and criterion == ("wanda" if name == "smollm2" else "magnitude"):
                more |= speed(done, inputs)
            before, after = (sum(getattr(d, when).parameters for d in done.plan.decisions) for when in ("before", "after"))
            rows.append(row(model=name, way=f"{criterion} {allocate}", params_kept=round(after / before, 3),
                            **quality(name, done.program, folder), **more))  # fmt: skip
    return rows


def windows(folder: Path) -> list[dict[str, Tensor]]:
    """Return 128 of the texts that stories260k wrote itself, 8 a batch."""
    return [{"input_ids": part} for part in torch.tensor(told(folder)[:128]).split(8)]


def wiki(folder: Path, split: str = "valid", count: int = 16) -> list[dict[str, Tensor]]:
    """Return windows of 512 tokens of WikiText-2."""
    from transformers import AutoTokenizer

    text = shared(f"wikitext2/wiki.{split}.tokens").read_text(encoding="utf-8")[: 4000 * count]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0, : 512 * count]
    return [{"input_ids": part} for part in ids.reshape(-1, 1, 512)]


def texts(folder: Path) -> list[dict[str, Tensor]]:
    """Return 256 sentences of the STS-B training split, 16 a batch."""
    from transformers import AutoTokenizer

    with shared("stsb/stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        found = [row[0] for row in csv.reader(file)][:256]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [dict(tokenizer(found[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 256, 16)]


CALIBRATED: Mapping[str, Callable[[Path], list[dict[str, Tensor]]]] = {"stories260k": windows, "minilm": texts, "smollm2": wiki}


def quality(name: str, runner: Any, folder: Path) -> dict[str, float]:
    """Return the perplexity or the correlation that a model is judged by."""
    if name == "minilm":
        return {"spearman": round(score(runner, "dev"), 4)}
    if name == "stories260k":
        stories = json.loads((shared(name) / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
        return {"perplexity": round(perplexity(runner, stories), 3)}
    if name == "smollm2":
        held = [batch["input_ids"][0].tolist() for batch in wiki(folder, "test", 2)]
        return {"perplexity": round(perplexity(runner, held), 2)}
    return {}


def perplexity(runner: Any, stories: list[list[int]]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for story in stories:
            ids = torch.tensor([story[:512]])
            total += float(F.cross_entropy(runner(input_ids=ids)["logits"][0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["minilm", "stories260k", "gpt2"])
    parser.add_argument("--kept", type=float, nargs="*", default=[0.5])
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for kept in options.kept:
            rows += bench_folder(name, kept, not options.no_speed)
    show("structured pruning", rows, kept=options.kept)


if __name__ == "__main__":
    main()
