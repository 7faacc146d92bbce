"""Structured pruning by half: speed against a dense model of that width, and quality.

    python tests/benchmarks/bench_prune.py [--models resnet20 minilm stories260k gpt2] [--kept 0.5]
        [--torch-pruning] [--no-speed]
    python tests/benchmarks/bench_prune.py --loraprune [--steps 200]

The dense model of that width is the pruned one with torch's own layers of the same sizes; speed is eager and ONNX Runtime, as
the ratio of the medians (1: as fast; the bar is 0.95). gpt2 is a random model of 4 layers, since no weights of one are at hand.
resnet20: CIFAR test accuracy before and after the norms' statistics are measured again, at equal FLOPs by `torch-pruning` too
(`pip install --no-deps torch-pruning`). stories260k: perplexity of its last stories; minilm: Spearman on the dev split
of STS-B. --loraprune: perplexity of the small Llama at 20 % and 50 % pruned, by the recipe `loraprune` and by pruning by
magnitude, Wanda's or Taylor's scores before the same steps of LoRA.
"""

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import score
from common import WORK, minilm, shared, show
from images import accuracy, cifar, resnet20
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.lower.ort import OrtRunner
from lrc.maps import Conv, Dense
from lrc.program.capture import capture_module
from lrc.run.flops import count_flops

RUNS = 30
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


def seconds(pairs: tuple[Callable[[], Any], Callable[[], Any]]) -> float:
    """Return how much faster the first of two runs is, from medians of interleaved runs."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for run, kept in zip(pairs, times, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[1]) / statistics.median(times[0])


@torch.no_grad()
def speed(done: lrc.Compiled, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the speed of a pruned model over that of a dense one of its width: eager, and ONNX Runtime."""
    ours, dense = done.graft().eval(), stock(done.graft())
    fixed = {"use_cache": False} if hasattr(ours, "config") else {}
    found = {"eager": seconds((lambda: ours(**inputs, **fixed), lambda: dense(**inputs, **fixed)))}
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
        runners = [OrtRunner(path) for path in paths]
        found["onnx"] = seconds((lambda: runners[0](**inputs), lambda: runners[1](**inputs)))
    return {name: round(value, 3) for name, value in found.items()}


def prune(program: Any, calibration: Any, amount: Mapping[str, float], criterion: str, **options: Any) -> lrc.Compiled:
    step = {"type": "prune", "targets": options.pop("targets", ["**"])}
    method = {"type": "structured", "criterion": criterion, "amount": dict(amount), **options.pop("method", {})}
    spec = {"version": 1, "passes": [{**step, "method": method}, *options.pop("then", [])]}
    return lrc.compile(program, spec, calibration=calibration, cache=WORK / "cache", **options)


def flops_of(program: Any, images: Tensor) -> float:
    """Return the FLOPs of one image."""
    return float(count_flops(program, {next(iter(program.inputs.examples)): images[:1]}))


def bench_resnet20(kept: float, compare: bool, timed: bool) -> list[dict[str, Any]]:
    model = resnet20()
    images, labels = cifar("test_2000")
    given, _ = cifar("train_1000")
    calibration = [{"x": given[i : i + 100]} for i in range(0, 1000, 100)]
    program = lrc.capture(model, inputs=[given[:4]])
    name = next(iter(program.inputs.examples))
    calibration = [{name: batch["x"]} for batch in calibration]
    dense = flops_of(program, given)
    rows: list[dict[str, Any]] = [{"model": "resnet20", "way": "dense", "top1": round(accuracy(model, images, labels), 4)}]
    for criterion in CRITERIA:
        for allocate in ("uniform", "global"):
            made = [
                prune(program, calibration, {"flops_kept": kept}, criterion, method={"allocate": allocate}, then=then)
                for then in ([], [{"type": "reestimate_norms"}])
            ]
            rows.append({
                "model": "resnet20", "way": f"{criterion} {allocate}",
                "flops": round(flops_of(made[0].program, given) / dense, 3),
                "top1": round(accuracy(made[0].module, images, labels), 4),
                "top1_norms_again": round(accuracy(made[1].module, images, labels), 4),
                **(speed(made[0], {name: given[:32]}) if timed else {}),
            })  # fmt: skip
    if compare:
        rows.append(torch_pruning(kept, given, images, labels, dense))
    return rows


def torch_pruning(kept: float, given: Tensor, images: Tensor, labels: Tensor, dense: float) -> dict[str, Any]:
    """Return the accuracy of torch-pruning's group magnitude at the same FLOPs.

    The channels between the two convolutions of a block alone: it does not follow those of a shortcut padded by zeros.
    """
    import torch_pruning as tp  # type: ignore[import-not-found]  # only for this comparison

    low, high = 0.0, 0.9
    best: nn.Module | None = None
    for _ in range(8):
        ratio = (low + high) / 2
        model = resnet20()
        kept_whole = [m for name, m in model.named_modules() if name in ("conv1", "linear") or name.endswith("conv2")]
        tp.pruner.MagnitudePruner(
            model,
            given[:1],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=kept_whole,
        ).step()
        flops = flops_of(lrc.capture(model.eval(), inputs=[given[:4]]), given) / dense
        low, high = (low, ratio) if flops <= kept else (ratio, high)
        best = model if flops <= kept else best
    assert best is not None, "some ratio meets the budget"
    made = lrc.compile(best.eval(), {"version": 1, "passes": [{"type": "reestimate_norms"}]}, inputs=[given[:4]],
                       calibration=[(given[i : i + 100],) for i in range(0, 1000, 100)], cache=WORK / "cache")  # fmt: skip
    return {
        "model": "resnet20", "way": "torch-pruning magnitude", "flops": round(flops_of(made.program, given) / dense, 3),
        "top1": round(accuracy(best, images, labels), 4), "top1_norms_again": round(accuracy(made.module, images, labels), 4),
    }  # fmt: skip


def bench_folder(name: str, kept: float, timed: bool) -> list[dict[str, Any]]:
    if name == "gpt2":
        import transformers

        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=8, n_positions=256)
        model = transformers.GPT2LMHeadModel(config).eval()
        folder = WORK / "gpt2_random"
        model.save_pretrained(folder)
    else:
        folder = minilm() if name == "minilm" else shared(name)
    program = lrc.capture(str(folder))
    ids = torch.randint(3, 400, (1, 128), generator=torch.Generator().manual_seed(0))
    inputs = {key: (ids if key == "input_ids" else torch.ones_like(ids) if key == "attention_mask" else torch.zeros_like(ids))
              for key in program.inputs.examples}  # fmt: skip
    rows: list[dict[str, Any]] = [{"model": name, "way": "dense", **quality(name, program)}]
    for criterion in CRITERIA if name in CALIBRATED else CRITERIA[:1]:
        for allocate in ("uniform", "global") if name in CALIBRATED else ("uniform",):
            options = {"targets": ["layers:[0-9999]"], "method": {"allocate": allocate}}
            given = CALIBRATED[name](folder) if name in CALIBRATED else None
            done = prune(program, given, {"width_kept": kept}, criterion, **options)
            before, after = (sum(getattr(d, when).parameters for d in done.plan.decisions) for when in ("before", "after"))
            rows.append({
                "model": name, "way": f"{criterion} {allocate}", "params_kept": round(after / before, 3),
                **quality(name, done.program), **(speed(done, inputs) if timed else {}),
            })  # fmt: skip
    return rows


def windows(folder: Path) -> list[dict[str, Tensor]]:
    """Return windows of 128 tokens of the first four stories."""
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    starts = [(story, i) for story in stories[:4] for i in range(0, len(story) - 127, 128)]
    return [{"input_ids": torch.tensor([story[i : i + 128]])} for story, i in starts]


def texts(folder: Path) -> list[dict[str, Tensor]]:
    """Return 256 sentences of the STS-B training split, 16 a batch."""
    from transformers import AutoTokenizer

    with shared("stsb/stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        found = [row[0] for row in csv.reader(file)][:256]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [dict(tokenizer(found[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 256, 16)]


CALIBRATED: Mapping[str, Callable[[Path], list[dict[str, Tensor]]]] = {"stories260k": windows, "minilm": texts}


def quality(name: str, runner: Any) -> dict[str, float]:
    """Return the perplexity or the correlation that a model is judged by."""
    if name == "minilm":
        return {"spearman": round(score(runner, "dev"), 4)}
    if name == "stories260k":
        stories = json.loads((shared(name) / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
        return {"perplexity": round(perplexity(runner, stories[4:]), 3)}
    return {}


def perplexity(runner: Any, stories: list[list[int]]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for story in stories:
            ids = torch.tensor([story[:512]])
            total += float(F.cross_entropy(runner(input_ids=ids)["logits"][0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(total / count)


def bench_loraprune(steps: int) -> list[dict[str, Any]]:
    folder = shared("stories260k")
    stories = json.loads((folder / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
    program = lrc.capture(str(folder))
    calibration = windows(folder)
    layers = ["layers:[0-9999]"]
    adapt = {"type": "adapt", "targets": layers, "method": "lora", "rank": 8, "alpha": 16}
    train = {
        "type": "train",
        "objective": "causal_lm",
        "steps": steps,
        "batch_size": 4,
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }
    rows: list[dict[str, Any]] = [{"way": "dense", "perplexity": round(perplexity(program, stories[4:]), 3)}]
    for gone in (0.2, 0.5):
        ways: dict[str, list[Any]] = {
            "loraprune": [
                adapt,
                {**train, "recipe": {"type": "loraprune", "width_kept": 1 - gone, "skip_first": 0.0, "skip_last": 0}},
            ]
        }
        for criterion in CRITERIA:
            method = {"type": "structured", "criterion": criterion, "amount": {"width_kept": 1 - gone}}
            ways[criterion] = [{"type": "prune", "targets": layers, "method": method}, adapt, train]
        for way, passes in ways.items():
            done = lrc.compile(program, {"version": 1, "passes": passes}, calibration=calibration, cache=WORK / "cache")
            rows.append({"way": way, "pruned": gone, "perplexity": round(perplexity(done.program, stories[4:]), 3),
                         "parameters": done.plan.parameters[1]})  # fmt: skip
    factors = sum(8 * sum(site.shape) for fqn, site in program.sites.items() if ".layers." in fqn)
    whole = sum(site.out_features * site.in_features for fqn, site in program.sites.items() if ".layers." in fqn)
    rows.append({"way": "gradients held", "loraprune_numbers": factors, "taylor_numbers": whole})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["resnet20", "minilm", "stories260k", "gpt2"])
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--loraprune", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if options.loraprune:
        show("LoRAPrune on stories260k", bench_loraprune(options.steps), steps=options.steps)
        return
    rows: list[dict[str, Any]] = []
    for name in options.models:
        timed = not options.no_speed
        images = name == "resnet20"
        rows += (
            bench_resnet20(options.kept, options.torch_pruning, timed) if images else bench_folder(name, options.kept, timed)
        )
    show("structured pruning", rows, kept=options.kept)


if __name__ == "__main__":
    main()
