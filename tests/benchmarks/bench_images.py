"""Image models by FLOPs of their convolutions: CIFAR ResNet-20, EfficientNet-Lite0 and DnCNN, by solver.

    python tests/benchmarks/bench_images.py [--models resnet20 efficientnet dncnn] [--solvers svd whitened afm kfac behind]
        [--kept 0.7 0.5 0.3] [--latency]

Needs the shared data, and for efficientnet its two packages and pillow. `behind` is kfac on the inputs that the already
compressed layers produce. `tucker` is tensorly's partial Tucker-2 of every kernel, without calibration, of the same size.
Quality is top-1 on the test images, or PSNR in dB for dncnn.
Calibrated on 1,000 training images (resnet20), on every second one of the 500 images with the others for the score
(efficientnet), on 24 other images cut to 96 x 96 (dncnn). Latency: ONNX Runtime, batch 32, as a ratio to the dense model.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import WORK, show
from images import accuracy, cifar, dncnn, efficientnet, grey_images, imagenet, noisy, psnr, resnet20
from torch import Tensor, nn

import lrc
from lrc.lower.ort import OrtRunner
from lrc.measure import measure_latency
from lrc.program import Program
from lrc.run.flops import count_flops

CROP = 48
BEHIND = {"type": "kfac", "fisher": "outputs", "damping_out": 0.01, "propagate": "compressed", "blend": 1.0}
FOLD, AGAIN = {"type": "fold_norms"}, {"type": "reestimate_norms"}


def passes(way: str, **step: Any) -> list[dict[str, Any]]:
    """Return the passes of a way: a solver with two factors, or words that are joined by `+`.

    `behind`: kfac on changed inputs; `fold`: batch norms are folded before; `again`: their statistics are measured
    afterwards; a form: that form, in place of two factors.
    """
    words = way.split("+")
    forms = [word for word in words if word in ("auto_form", "spatial", "tucker2", "cp")]
    solvers = [word for word in words if word not in (*forms, "fold", "again")]
    solver = BEHIND if "behind" in solvers else solvers[0]
    form = forms[0].removesuffix("_form") if forms else "two_factor"
    made = {"type": "factorize", "solver": solver, "form": form, **step}
    return [*([FOLD] if "fold" in words else []), made, *([AGAIN] if "again" in words else [])]


@dataclass
class Case:
    """A model, calibration batches, what is compressed, and how it is scored."""

    model: nn.Module
    batches: list[dict[str, Tensor]]
    score: Callable[[Any], float]
    task: str
    ignore: list[str]

    def program(self) -> Program:
        """The captured model."""
        example = {name: value[:4] for name, value in self.batches[0].items() if name != "labels"}
        made = lrc.capture(self.model, inputs=example)
        made.origin = replace(made.origin, task=self.task)
        return made


def case(name: str, samples: int) -> Case:
    if name == "resnet20":
        (x, y), (test, labels) = cifar("train_1000"), cifar("test_2000")
        x, y = x[:samples], y[:samples]
        batches = [{"x": part, "labels": told} for part, told in zip(x.split(100), y.split(100), strict=True)]
        score = lambda model: accuracy(model, test, labels)  # noqa: E731 - a case is data
        return Case(resnet20(), batches, score, "image-classification", ["conv1", "linear"])
    if name == "efficientnet":
        x, y = imagenet()
        batches = [{"inputs": part, "labels": told} for part, told in zip(x[::2].split(25), y[::2].split(25), strict=True)]
        score = lambda model: accuracy(model, x[1::2], y[1::2])  # noqa: E731 - a case is data
        return Case(efficientnet(), batches, score, "image-classification", [])
    others = grey_images("bsd68_part1", 24)
    cut = torch.cat([image[..., 100 : 100 + CROP, 100 : 100 + CROP] for image in others])
    images = grey_images("set12", 7)
    inputs = noisy(images)
    batches = [{"input": torch.cat(noisy(list(part.split(1))))} for part in cut.split(12)]
    return Case(dncnn(), batches, lambda model: psnr(model, images, inputs), "denoising", [])


def tucker(model: nn.Module, parameters: int) -> tuple[nn.Module, int]:
    """Return the model with every 3 x 3 kernel in Tucker-2 form, ranks the same share everywhere, and its parameters."""
    share = 1.0
    while True:
        made = copy.deepcopy(model)
        for name, module in list(made.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1 and module.groups == 1 and module.in_channels > 3:
                made.set_submodule(name, tucker_kernel(module, share))
        size = sum(p.numel() for p in made.parameters())
        if size <= parameters:
            return made, size
        share -= 0.01


def tucker_kernel(module: nn.Conv2d, share: float) -> nn.Sequential:
    from tensorly.decomposition import partial_tucker  # type: ignore[import-untyped]  # a test-only package

    weight = module.weight.detach().numpy()
    ranks = [max(1, round(share * size)) for size in weight.shape[:2]]
    (core, (out, into)), _ = partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")
    first = nn.Conv2d(module.in_channels, ranks[1], 1, bias=False)
    middle = nn.Conv2d(ranks[1], ranks[0], module.kernel_size, module.stride, module.padding, bias=False)  # type: ignore[arg-type]
    last = nn.Conv2d(ranks[0], module.out_channels, 1, bias=module.bias is not None)
    for layer, value in ((first, into.T[..., None, None]), (middle, core), (last, out[..., None, None])):
        layer.weight.data.copy_(torch.from_numpy(value.copy()))
    if module.bias is not None and last.bias is not None:
        last.bias.data.copy_(module.bias)
    return nn.Sequential(first, middle, last).eval()


def faster(dense: Program, program: Program, example: dict[str, Tensor]) -> float:
    """Return the ratio of the dense model's latency to the other's, in one interleaved run of ONNX Runtime."""
    name, value = next(iter(example.items()))
    batch = value[:1].expand(32, *value.shape[1:]).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for label, made in (("dense", dense), ("compressed", program)):
            same = lrc.compile(made.clone(), {"version": 1, "passes": []}, cache=WORK / "cache")
            runners.append(OrtRunner(same.to_onnx(Path(folder) / f"{label}.onnx")))
        calls = {str(i): lambda runner=runner: runner(**{name: batch}) for i, runner in enumerate(runners)}
        times = measure_latency(calls, rounds=15)
    return times["0"].median / times["1"].median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet20", "efficientnet", "dncnn"])
    parser.add_argument("--solvers", nargs="+", default=["svd", "kfac", "kfac+auto_form", "fold+kfac+auto_form"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--samples", type=int, default=1000, help="calibration images of ResNet-20")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--tucker", action="store_true", help="beside tensorly's Tucker-2 of the last one's size")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        given = case(name, options.samples)
        program = given.program()
        size = program.size()[0]
        rows.append({"model": name, "solver": "dense", "score": round(given.score(given.model), 4), "parameters": size})
        for kept in options.kept:
            for solver in options.solvers:
                began = time.perf_counter()
                spec = {"version": 1, "passes": passes(solver, ignore=given.ignore, rank={"flops_kept": kept})}
                done = lrc.compile(program.clone(), spec, calibration=given.batches, cache=WORK / "cache")
                seconds = time.perf_counter() - began
                score = given.score(done.module)
                row = {
                    "model": name,
                    "solver": solver,
                    "kept": kept,
                    "score": round(score, 4) if math.isfinite(score) else None,
                }
                measured = count_flops(done.program, given.batches[0]) / count_flops(program, given.batches[0])
                row |= {"flops": round(measured, 3), "parameters": done.plan.parameters[1], "seconds": round(seconds, 1)}
                if options.latency and solver == options.solvers[-1]:
                    row["latency_ratio"] = round(faster(program, done.program, given.batches[0]), 2)
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
            if name == "resnet20" and options.tucker:
                made, count = tucker(given.model, done.plan.parameters[1])
                rows.append({"model": name, "solver": "tucker", "kept": kept, "score": given.score(made), "parameters": count})
    show("image models", rows)


if __name__ == "__main__":
    main()
