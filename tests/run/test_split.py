"""split and quantize: what the plan says of them, budgets kept, and errors that name the place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lrc_passes.quantize import in_few_bits
from torch import Tensor, nn

import lrc
from lrc.errors import LrcError, SpecError, UsageError
from lrc.formats import FORMATS
from lrc.maps import Quantized, Sparse, Sum
from lrc.ranks.knapsack import cheapest_choice
from lrc.run.solved_pass import SolvedPass


class Wide(nn.Module):
    """Two linears that are large enough for a few bits to pay."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide().eval()


def inputs(rows: int = 32) -> Tensor:
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 96)


def compiled(model: nn.Module | None = None, **options: Any) -> lrc.Compiled:
    step = {"type": "split", **options} if "type" not in options else options
    return lrc.compile(
        model or wide(), {"version": 1, "passes": [step]}, inputs={"x": inputs(4)}, calibration=[{"x": inputs()}], cache="cache"
    )


def test_a_split_is_a_product_and_a_rest() -> None:
    done = compiled(solver={"type": "lq", "format": "nf3"}, rank=4)
    made = done.program.sites["up"].map
    assert isinstance(made, Sum)
    assert repr(made) == "Sum(Chain[128,4,96], Quantized[nf3,128,96])"
    assert isinstance(made.rest, Quantized)
    assert made.bias is not None
    torch.testing.assert_close(done.module(inputs()), wide()(inputs()), atol=0.5, rtol=0)
    assert "relative error" in done.plan.decisions[0].notes[0]


def test_a_second_run_solves_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(solver="loftq", rank=4)
    monkeypatch.setattr(SolvedPass, "call", None)
    again = compiled(solver="loftq", rank=4)
    assert again.plan == first.plan
    assert torch.equal(again.module(inputs()), first.module(inputs()))


@pytest.mark.parametrize(("pattern", "share"), [("rows", 0.25), ("rows", 0.0), ("all", 0.5), ("1:4", None)])
def test_params_kept_is_kept(pattern: str, share: float | None) -> None:
    done = compiled(solver={"type": "oats", "pattern": pattern, "iterations": 4}, rank={"params_kept": 0.4},
                    **({} if share is None else {"rank_share": share}))  # fmt: skip
    for fqn in ("up", "down"):
        site = done.program.sites[fqn]
        numbers = site.map.cost().parameters - site.map.bias_cost(1).parameters
        assert 0.36 * site.out_features * site.in_features <= numbers <= 0.4 * site.out_features * site.in_features
        if share == 0.0:
            assert isinstance(site.map, Sparse)


@pytest.mark.parametrize(("pattern", "runs"), [("2:4", "(2:4), run dense"), ("16x16", "(16x16), run dense"), ("all", "CSR")])
def test_the_plan_says_how_a_sparse_rest_is_stored_and_run(pattern: str, runs: str) -> None:
    density = {"2:4": None, "16x16": 0.25, "all": 0.02}[pattern]
    done = compiled(solver={"type": "godec", "pattern": pattern, "density": density, "iterations": 2}, rank=2)
    site = done.program.sites["up"].map
    assert isinstance(site, Sum)
    assert isinstance(site.rest, Sparse)
    assert site.rest.kind.pattern == pattern
    assert runs in done.plan.decisions[0].notes[-1]
    done.save("out")
    torch.testing.assert_close(next(iter(lrc.load("out")(x=inputs()).values())), done.module(inputs()))


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.5])
def test_bits_on_average_are_kept(bits: float) -> None:
    done = compiled(solver={"type": "lq", "bits": bits, "iterations": 2}, rank=2)
    rests = [done.program.sites[fqn].map.rest for fqn in ("up", "down")]  # type: ignore[union-attr]
    stored = 8 * sum(rest.cost().bytes for rest in rests)  # type: ignore[union-attr]
    assert stored <= (bits + 0.02) * (96 * 128 + 128 * 64)
    assert sum(note.startswith("formats: ") for note in done.plan.notes) == 1


def test_a_size_is_that_of_the_whole_model() -> None:
    done = compiled(solver={"type": "lq", "bits": {"size_mb": 0.012}, "iterations": 2}, rank=2)
    assert done.plan.bytes[1] <= 12_000
    with pytest.raises(UsageError, match=r"solver.bits.size_mb: expected more than 0\.00\d+ MB"):
        compiled(solver={"type": "lq", "bits": {"size_mb": 0.002}}, rank=2)


@pytest.mark.parametrize("formats", [["int4", "int8"], ["nf2", "nf4", "nf8"]])
@pytest.mark.parametrize("size", [0.0071, 0.010])
def test_a_size_holds_where_rows_are_padded_to_whole_blocks(formats: list[str], size: float) -> None:
    model = nn.Sequential(nn.Linear(33, 70), nn.Linear(70, 70), nn.Linear(70, 7))
    step = {
        "type": "split",
        "solver": {"type": "lq", "bits": {"size_mb": size}, "formats": formats, "iterations": 1},
        "rank": 1,
    }
    spec = {"version": 1, "passes": [step]}
    if formats[0] == "int4" and size < 0.0096:
        with pytest.raises(UsageError, match=r"solver\.bits: expected at least"):
            lrc.compile(model, spec, inputs=(torch.randn(2, 33),), cache="cache")
        return
    done = lrc.compile(model, spec, inputs=(torch.randn(2, 33),), cache="cache")
    assert done.plan.bytes[1] == done.program.size()[1] <= 1e6 * size


def test_a_budget_of_bits_over_nothing_to_split_keeps_everything() -> None:
    done = compiled(solver={"type": "lq", "bits": 3.0}, rank=200)
    assert all("more than the smaller side" in str(d.keep) for d in done.plan.decisions)


@pytest.mark.parametrize("step", [
    {"solver": "oats", "rank": 4},
    {"solver": {"type": "oats", "density": 0.3}, "rank": {"params_kept": 0.5}, "rank_share": 0.2},
    {"solver": "oats", "rank": {"params_kept": 0.5}},
    {"solver": {"type": "oats", "pattern": "2:4", "density": 0.5}, "rank": 4},
    {"solver": {"type": "oats", "pattern": "4:2"}, "rank": 4},
    {"solver": "lq", "rank": {"params_kept": 0.5}, "rank_share": 0.2},
    {"solver": "lq", "rank": {"energy": 0.5}},
    {"solver": "lq", "rank": 4, "rank_share": 0.2},
    {"solver": {"type": "lq", "format": "nf5"}, "rank": 4},
    {"solver": "kfac", "rank": 4},
])  # fmt: skip
def test_amounts_that_contradict_each_other_are_refused(step: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        compiled(**step)
    assert caught.value.exit_code == 2
    assert "passes.0" in str(caught.value)


def test_what_cannot_be_split_stays_with_a_reason() -> None:
    done = compiled(solver={"type": "lq", "format": "nf4"}, rank=80)
    assert done.plan.decisions[1].keep == "rank 80 is more than the smaller side of 64 x 128"


def test_factors_can_be_quantised_after_factorize() -> None:
    steps = [
        {"type": "factorize", "solver": "svd", "rank": 16, "form": "two_factor"},
        {"type": "quantize", "format": "int8"},
    ]
    done = lrc.compile(wide(), {"version": 1, "passes": steps}, inputs={"x": inputs(4)}, cache="cache")
    made = done.program.sites["up"].map
    assert repr(made) == "Chain(Quantized[int8,128,16], Quantized[int8,16,96])"
    exact = lrc.compile(wide(), {"version": 1, "passes": steps[:1]}, inputs={"x": inputs(4)}, cache="cache").module(inputs())
    assert float(((done.module(inputs()) - exact).norm() / exact.norm()).detach()) < 0.02


@pytest.mark.parametrize("first", [[], [{"type": "factorize", "solver": "svd", "rank": 24, "form": "two_factor"}]])
def test_rounding_with_feedback_serves_the_inputs_better(first: list[dict[str, Any]]) -> None:
    mixed = torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.02, 1, 96)
    x = inputs(512) @ mixed
    errors = []
    for rounding in ("nearest", "feedback"):
        steps = [*first, {"type": "quantize", "format": "nf3", "rounding": rounding, "targets": ["up"]}]
        done = lrc.compile(wide(), {"version": 1, "passes": steps}, inputs={"x": x[:4]}, calibration=[{"x": x}], cache="cache")
        found = done.program.sites["up"].map
        base = lrc.compile(wide(), {"version": 1, "passes": first}, inputs={"x": x[:4]}, cache="cache").program.sites["up"].map
        errors.append(float((x @ (found.dense().weight - base.dense().weight).T).norm()))
        assert found.cost() == in_few_bits(base, FORMATS["nf3"]).cost()  # type: ignore[union-attr]
    assert errors[1] < 0.8 * errors[0]


def test_quantised_weights_stay_packed_in_the_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 64, bias=False)).eval()  # the exporter folds small ones
    done = lrc.compile(large, {"version": 1, "passes": ["quantize"]}, inputs={"input": inputs(4)}, cache="cache")
    done.save("out")
    loaded = lrc.load("out")(input=inputs())
    assert torch.equal(next(iter(loaded.values())), done.module(inputs()))
    file = done.to_onnx("model.onnx")
    assert Path(file).stat().st_size < 4 * 512 * (96 + 64) / 4
    import onnxruntime

    found = onnxruntime.InferenceSession(str(file)).run(None, {"input": inputs().numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), done.module(inputs()).detach(), atol=1e-4, rtol=1e-4)


def test_a_convolution_is_not_quantised() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 64)).eval()
    done = lrc.compile(
        model, {"version": 1, "passes": [{"type": "quantize"}]}, inputs=(torch.randn(2, 3, 8, 8),), cache="cache"
    )
    kept = {d.name: d.keep for d in done.plan.decisions}
    assert "has no matrix" in str(kept["0"])
    assert kept["2"] is None


def brute_force(losses: list[list[float]], costs: list[list[float]], budget: float) -> float:
    from itertools import product

    ways = product(*(range(len(site)) for site in losses))
    totals = [
        sum(site[i] for site, i in zip(losses, way, strict=True))
        for way in ways
        if sum(site[i] for site, i in zip(costs, way, strict=True)) <= budget
    ]
    return min(totals)


@pytest.mark.parametrize("seed", range(5))
def test_the_integer_program_agrees_with_trying_everything(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(4, 5, generator=generator).tolist()
    costs = torch.rand(4, 5, generator=generator).tolist()
    places, note = cheapest_choice(losses, costs, 1.6)
    assert note is None
    assert sum(cost[i] for cost, i in zip(costs, places, strict=True)) <= 1.6
    assert sum(loss[i] for loss, i in zip(losses, places, strict=True)) == pytest.approx(brute_force(losses, costs, 1.6))


def test_an_impossible_budget_says_what_is_the_least() -> None:
    with pytest.raises(LrcError, match=r"at least 3 bytes, what the smallest options need, got 2 bytes"):
        cheapest_choice([[1.0, 0.0], [1.0]], [[1.0, 5.0], [2.0]], 2.0)


def test_the_names_are_listed() -> None:
    from lrc.run.catalogue import names

    assert {"lq", "loftq", "oats", "slim", "godec", "pcp", "sltrain"} <= set(names("splitters")["splitters"])
