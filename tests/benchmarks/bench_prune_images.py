"""Structured pruning of ResNet-20 under a budget of FLOPs, beside torch-pruning.

    python tests/benchmarks/bench_prune_images.py [--kept 0.5] [--where inside all] [--allocate uniform global]
        [--torch-pruning] [--no-speed]

CIFAR-10 test accuracy before and after the norms' statistics are measured again (on 500 training images, which calibrate too).
FLOPs are of the whole model. `inside`: the channels between the two convolutions of a block alone, which is what torch-pruning
cuts too, for it does not follow a shortcut padded by zeros (`pip install --no-deps torch-pruning`); `all`: those of the
residual stream as well. `difference` and speed as in bench_prune.py.
"""

import argparse
from typing import Any

import torch
from bench_prune import CRITERIA, checked, prune, row, speed
from common import WORK, show
from images import accuracy, cifar, resnet20
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.run.flops import count_flops


def flops_of(program: Any, images: Tensor) -> float:
    """Return the FLOPs of one image."""
    return float(count_flops(program, {next(iter(program.inputs.examples)): images[:1]}))


def bench_resnet20(kept: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    model = resnet20()
    images, labels = cifar("test_2000")
    given, _ = cifar("train_1000")
    program = lrc.capture(model, inputs=[given[:4]])
    name = next(iter(program.inputs.examples))
    calibration = [{name: given[i : i + 100]} for i in range(0, 500, 100)]
    dense = flops_of(program, given)
    rows = [row(model="resnet20", way="dense", top1=round(accuracy(model, images, labels), 4))]

    def scored(way: str, made: nn.Module, again: nn.Module, flops: float, **more: Any) -> None:
        found = {"top1": round(accuracy(made, images, labels), 4), "norms_again": round(accuracy(again, images, labels), 4)}
        rows.append(row(model="resnet20", way=way, flops=round(flops / dense, 3), **found, **more))

    inside = ["layer*.*.conv1", "layer*.*.conv2"]
    outside = sum(flops_of_site(program, fqn, given) for fqn in ("conv1", "linear"))
    shares = {"inside": (kept * dense - outside) / (dense - outside), "all": kept}
    for where in options.where:
        for allocate in options.allocate:
            for criterion in CRITERIA:
                how: dict[str, Any] = {"targets": inside if where == "inside" else ["**"], "method": {"allocate": allocate}}
                amount = {"flops_kept": shares[where]}
                done, more = checked(lambda: prune(program, calibration, amount, criterion, **how), {name: given[:8]})  # noqa: B023
                again = prune(program, calibration, amount, criterion, then=[{"type": "reestimate_norms"}], **how)
                if not options.no_speed and (criterion, allocate, where) == ("magnitude", "uniform", "inside"):
                    more |= speed(done, {name: given[:32]})
                scored(f"{criterion} {allocate} {where}", done.module, again.module, flops_of(done.program, given), **more)
    if options.torch_pruning:
        for criterion in ("magnitude", "taylor"):
            for globally in (way == "global" for way in options.allocate):
                best, flops = torch_pruning(criterion, globally, kept * dense, given)
                batches = [(batch[name],) for batch in calibration]
                again = lrc.compile(best, {"version": 1, "passes": [{"type": "reestimate_norms"}]}, inputs=[given[:4]],
                                    calibration=batches, cache=WORK / "cache")  # fmt: skip
                way = f"torch-pruning {criterion} {'global' if globally else 'uniform'} inside"
                scored(way, best, again.module, flops)
    return rows


def flops_of_site(program: Any, fqn: str, images: Tensor) -> float:
    """Return the FLOPs of one image in the stem or in the head."""
    positions = images.shape[-1] * images.shape[-2] if fqn == "conv1" else 1
    return float(program.map_of(fqn).cost(positions).flops)


def torch_pruning(criterion: str, globally: bool, most: float, given: Tensor) -> tuple[nn.Module, float]:
    """Return what torch-pruning leaves of ResNet-20 under a budget of FLOPs, and its FLOPs.

    The channels between the two convolutions of a block alone. Taylor: gradients of the cross-entropy on 500 training images.
    """
    import torch_pruning as tp  # type: ignore[import-not-found]  # only for this comparison

    dense, labels = resnet20(), cifar("train_1000")[1]
    for i in range(0, 500, 100) if criterion == "taylor" else ():
        F.cross_entropy(dense(given[i : i + 100]), labels[i : i + 100]).backward()
    low, high = 0.0, 0.98
    best: tuple[nn.Module, float] | None = None
    for _ in range(8):
        ratio = (low + high) / 2
        model = resnet20()
        kept_whole = [m for name, m in model.named_modules() if name in ("conv1", "linear") or name.endswith("conv2")]
        importance = (
            tp.importance.GroupTaylorImportance() if criterion == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
        )
        for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        tp.pruner.MagnitudePruner(
            model, given[:1], importance=importance, pruning_ratio=ratio, global_pruning=globally, ignored_layers=kept_whole
        ).step()
        model.zero_grad()
        flops = flops_of(lrc.capture(model.eval(), inputs=[given[:4]]), given)
        low, high = (low, ratio) if flops <= most else (ratio, high)
        best = (model, flops) if flops <= most else best
    assert best is not None, "some ratio meets the budget"
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="*", default=[0.5])
    parser.add_argument("--where", nargs="*", default=["inside", "all"], choices=["inside", "all"])
    parser.add_argument("--allocate", nargs="*", default=["uniform", "global"], choices=["uniform", "global"])
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [found for kept in options.kept for found in bench_resnet20(kept, options)]
    show("structured pruning of ResNet-20", rows)


if __name__ == "__main__":
    main()
