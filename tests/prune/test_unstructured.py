"""prune, method unstructured: single entries, n of every m, blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import SolverError, SpecError
from lrc.maps import Sparse


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16, bias=False)).eval()


def inputs(count: int = 64) -> Tensor:
    scale = torch.linspace(0.1, 3, 32)
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1)) * scale


def pruned(*more: Any, model: nn.Module | None = None, given: Tensor | None = None, **method: Any) -> lrc.Compiled:
    passes = [{"type": "prune", "method": {"type": "unstructured", **method}}, *more]
    x = inputs() if given is None else given
    return lrc.compile(
        model or net(), {"version": 1, "passes": passes}, inputs={"input": x[:4]}, calibration=[{"input": x}], cache="cache"
    )


def masked(support: dict[str, Tensor]) -> nn.Module:
    """The model with zeros where entries were dropped."""
    model = net()
    for name, kept in support.items():
        model.get_submodule(name).weight.data *= kept
    return model


def supports(done: lrc.Compiled) -> dict[str, Tensor]:
    return {fqn: done.program.sites[fqn].map.dense().weight != 0 for fqn in ("0", "2")}


@pytest.mark.parametrize(("method", "kept"), [
    ({"density": 0.3}, {"0": 48 * 9, "2": 16 * 14}),
    ({"density": 0.3, "pattern": "all"}, {"0": 460, "2": 230}),
    ({"pattern": "2:4"}, {"0": 768, "2": 384}),
    ({"pattern": "1:4", "criterion": "wanda"}, {"0": 384, "2": 192}),
    ({"density": 0.5, "pattern": "8x8"}, {"0": 768, "2": 384}),
    ({"density": 0.5, "criterion": "wanda"}, {"0": 768, "2": 384}),
])  # fmt: skip
def test_exactly_as_many_entries_stay_as_were_asked_for_and_the_model_is_the_masked_one(
    method: dict[str, Any], kept: dict[str, int]
) -> None:
    done = pruned(**method)
    found = supports(done)
    assert {fqn: int(support.sum()) for fqn, support in found.items()} == kept
    for decision in done.plan.decisions:
        made = done.program.sites[decision.name].map
        assert isinstance(made, Sparse)
        assert decision.notes[0] == f"{kept[decision.name]} of {made.out_features * made.in_features} entries stay by " + (
            method.get("criterion", "magnitude")
        )
        assert decision.after.bytes == sum(t.nbytes for t in made.state_dict().values())
    exact = masked(found)(inputs()).detach()
    torch.testing.assert_close(done.module(inputs()).detach(), exact, atol=1e-6, rtol=1e-5)
    for merge in ({"type": "merge"}, {"type": "merge", "dense": True}):
        torch.testing.assert_close(pruned(merge, **method).module(inputs()).detach(), exact, atol=1e-6, rtol=1e-5)


def test_magnitude_keeps_the_largest_and_wanda_what_its_inputs_make_large() -> None:
    model, x = net(), inputs()
    reads = {"0": x, "2": model[1](model[0](x)).detach()}
    by_size, by_output = supports(pruned(density=0.25)), supports(pruned(density=0.25, criterion="wanda"))
    for fqn, seen in reads.items():
        W = model.get_submodule(fqn).weight.detach()
        for scores, found in ((W.abs(), by_size[fqn]), (W.abs() * seen.norm(dim=0), by_output[fqn])):
            kept = scores.sort(1, descending=True).indices[:, : W.shape[1] // 4]  # as the published code of Wanda does
            assert torch.equal(found, torch.zeros_like(found).scatter(1, kept, True))
    exact = model(x)
    errors = [
        float((pruned(density=0.25, criterion=criterion).module(x) - exact).norm().detach())
        for criterion in ("wanda", "magnitude")
    ]
    assert errors[0] < errors[1]


def test_two_of_four_stay_in_every_group() -> None:
    for support in supports(pruned(pattern="2:4", criterion="wanda")).values():
        assert bool((support.reshape(-1, 4).sum(1) == 2).all())


def test_an_input_that_is_always_zero_is_noted() -> None:
    x = inputs()
    x[:, 3] = 0
    (first, _) = pruned(density=0.5, criterion="wanda", given=x).plan.decisions
    assert "1 of 32 inputs are always nearly zero" in first.notes[1]


def test_what_would_not_be_smaller_and_what_is_no_linear_stays() -> None:
    assert "need no fewer bytes" in str(pruned(density=0.98).plan.decisions[0].keep)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 16)).eval()
    x = torch.randn(6, 3, 8, 8)
    done = lrc.compile(
        conv, {"version": 1, "passes": [{"type": "prune", "method": {"type": "unstructured", "density": 0.5}}]},
        inputs=(x,), cache="cache",
    )  # fmt: skip
    assert "only dense linear weights" in str(done.plan.decisions[0].keep)
    assert done.plan.decisions[1].keep is None


@pytest.mark.parametrize("method", [{}, {"density": 0.5, "pattern": "2:4"}, {"density": 1.5}, {"pattern": "4:2"}])
def test_amounts_are_said_once(method: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"passes\.0"):
        pruned(**method)


@pytest.mark.parametrize("method", [{"density": 0.02}, {"density": 0.5, "pattern": "64x64"}])
def test_a_density_that_leaves_nothing_keeps_the_weight_with_the_reason(method: dict[str, Any]) -> None:
    done = pruned(**method)
    kept = {d.sites[0]: d.keep or "" for d in done.plan.decisions}
    assert f"a density of {method['density']:g} leaves nothing of Dense[48,32]" in kept["0"]
    torch.testing.assert_close(done.module(inputs()), net()(inputs()))


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[2, 3] = torch.nan
    with pytest.raises(SolverError, match="the scores of 0 by magnitude: expected finite numbers, got 1 NaN"):
        pruned(density=0.3, model=model)
