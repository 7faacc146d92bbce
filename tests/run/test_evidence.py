"""Allocators that measure the model first, on tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.run.evidence import Outputs

Compile = Callable[..., lrc.Compiled]


class Stack(nn.Module):
    """Four residual blocks; the later ones change less and less."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(torch.tanh(x)) / 4**i
        return x


def stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


def compile_stack(compiled: Compile, **options: Any) -> lrc.Compiled:
    batches = [{"x": torch.randn(16, 24, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    return compiled(stack(), inputs=batches[0], calibration=batches, solver="svd", form="two_factor", **options)


def ranks(done: lrc.Compiled) -> list[int]:
    return [d.rank or 24 for d in done.plan.decisions]


def test_a_perceptron_has_no_blocks(compiled: Compile) -> None:
    with pytest.raises(UsageError, match=r"passes\.0\.allocate: no target is in a repeated block"):
        compiled(rank={"params_kept": 0.7}, allocate="block_influence")


def test_layers_that_matter_less_keep_less(compiled: Compile) -> None:
    done = compile_stack(compiled, rank={"params_kept": 0.6}, allocate="sensitivity_bisect")
    found = ranks(done)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    before, after = (sum(getattr(d, which).parameters for d in done.plan.decisions) for which in ("before", "after"))
    assert after <= 0.6 * before


def test_what_was_measured_is_taken_over(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rank": {"params_kept": 0.6}, "allocate": {"type": "sensitivity_bisect", "ratios": [0.3, 0.6]}}
    first = compile_stack(compiled, **options)
    monkeypatch.setattr(Outputs, "change", lambda *_: pytest.fail("everything was measured before"))
    assert compile_stack(compiled, **options).plan == first.plan
    assert ranks(compile_stack(compiled, **{**options, "rank": {"params_kept": 0.5}})) != ranks(first)


def test_the_change_of_outputs_is_relative_and_that_of_logits_a_divergence() -> None:
    program = tiny.captured_mlp()
    batches = tiny.calibration_of_mlp()
    assert Outputs(program, batches).change(program.clone()) == 0.0
    other = lrc.capture(tiny.mlp(1), {"x": tiny.mlp_inputs()})
    x = torch.cat([batch["x"] for batch in batches])
    with torch.no_grad():
        a, b = tiny.mlp()(x).double(), tiny.mlp(1)(x).double()
    expected = float((a - b).square().sum() / a.square().sum())
    assert Outputs(program, batches).change(other) == pytest.approx(expected, rel=1e-5)
    classes = program.clone()
    classes.origin = type(program.origin)(task="image-classification")
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert Outputs(classes, batches).change(other) == pytest.approx(expected, rel=1e-5)


def test_a_metric_may_be_the_measure(compiled: Compile) -> None:
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    with torch.no_grad():
        np.savez("labelled.npz", x=x.numpy(), labels=tiny.mlp()(x).argmax(1).numpy())
    metric = {"type": "accuracy", "dataset": "labelled.npz"}
    allocate = {"type": "sensitivity_bisect", "metric": metric, "ratios": [0.4, 0.8]}
    done = compiled(rank={"params_kept": 0.7}, allocate=allocate)
    assert any(note.startswith("sensitivity: every layer alone costs the model at most") for note in done.plan.notes)


def test_shares_follow_the_influence(llama: Path, data: Path, tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "deep", num_hidden_layers=3)
    spec = tiny.factorize(targets=[tiny.LAYERS], rank={"params_kept": 0.6}, allocate="block_influence", form="two_factor")
    spec |= {"calibration": {"dataset": str(data / "stream.txt"), "samples": 6, "max_length": 10}}
    plan = lrc.plan(folder, spec, cache=tmp_path / "cache")
    (note,) = [note for note in plan.notes if note.startswith("block influence: ")]
    influence = {name: float(value) for name, value in (part.split() for part in note.split(": ")[1].split(", "))}
    kept = {block: sum(d.after.parameters for d in plan.decisions if d.name.startswith(f"{block}.")) for block in influence}
    assert len(influence) == 3
    assert sorted(influence, key=influence.__getitem__) == sorted(kept, key=kept.__getitem__)
