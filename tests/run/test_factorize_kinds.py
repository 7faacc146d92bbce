"""factorize and merge on convolutions and embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.lower.ort import OrtRunner
from lrc.maps import Chain, Conv, ConvChain, Lookup

Compile = Callable[..., lrc.Compiled]
SOLVERS: list[Any] = ["svd", "whitened", "afm", "kfac", {"type": "kfac", "propagate": "compressed"}]


class Images(nn.Module):
    """Convolutions with and without a bias, with a stride, in groups, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.down(h))))))
        return self.head(h.mean((2, 3)))


class Words(nn.Module):
    """The mean of looked-up rows, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12, padding_idx=0)
        self.fc = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.table(ids).mean(1))


def images() -> tuple[nn.Module, Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Images().eval(), torch.randn(4, 3, 8, 8), [{"x": torch.randn(32, 3, 8, 8)} for _ in range(2)]


def words() -> tuple[nn.Module, Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Words().eval(), torch.randint(1, 40, (4, 6)), [{"ids": torch.randint(1, 40, (32, 6))} for _ in range(2)]


def changed(model: nn.Module, done: lrc.Compiled, x: Tensor) -> float:
    with torch.no_grad():
        return float((done.module(x) - model(x)).norm() / model(x).norm())


def test_the_rewritten_graph_reads_as_the_golden_text(compiled: Compile, golden: Callable[[str, str], None]) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, solver="svd", rank={"fraction": 0.25})
    golden("factorize_conv", str(done.program))
    model, ids, items = words()
    done = compiled(model, inputs=ids, calibration=items, targets=["table", "fc"], solver="svd", rank=2)
    golden("factorize_lookup", str(done.program))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_rewrites_both_kinds(solver: Any, compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["down"], solver=solver, rank=13)
    assert isinstance(done.program.maps["down"], ConvChain)
    assert 0 < changed(model, done, x) < 0.2
    model, ids, items = words()
    done = compiled(model, inputs=ids, calibration=items, targets=["table"], solver=solver, rank=8)
    assert isinstance(done.program.maps["table"], Chain)
    assert 0 < changed(model, done, ids) < 0.5


@pytest.mark.parametrize(("make", "least"), [(images, 0.9), (words, 0.9)])
def test_calibrated_solvers_beat_the_weights_own_spectrum(make: Any, least: float, compiled: Compile) -> None:
    model, x, items = make()
    targets = ["first", "down"] if make is images else ["table"]
    budget = {"params_kept": 0.5}
    plain = compiled(model, inputs=x, calibration=items, targets=targets, solver="svd", rank=budget)
    ours = compiled(model, inputs=x, calibration=items, targets=targets, solver="kfac", rank=budget)
    batch = next(iter(items[0].values()))
    assert changed(model, ours, batch) < least * changed(model, plain, batch)
    assert ours.plan.parameters[1] <= plain.plan.parameters[0]


def test_both_views_and_the_folder_compute_the_same(compiled: Compile, tmp_path: Path) -> None:
    for make, targets in ((images, ["down", "grouped", "head"]), (words, ["table"])):
        model, x, items = make()
        done = compiled(model, inputs=x, calibration=items, targets=targets, solver="kfac", rank=3)
        with torch.no_grad():
            expected = done.program(x)["output"]
            assert torch.equal(done.graft()(x), expected)
        done.save(tmp_path / targets[0])
        loaded = lrc.load(tmp_path / targets[0])
        with torch.no_grad():
            name = next(iter(items[0]))
            assert torch.allclose(loaded(**{name: x})["output"], expected, atol=1e-6)
        onnx = OrtRunner(done.to_onnx(tmp_path / f"{targets[0]}.onnx"))
        assert torch.allclose(torch.as_tensor(onnx(**{name: x})["output"]), expected, atol=1e-5)


def test_a_depthwise_convolution_stays_with_the_reason(compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["depthwise", "down"], solver="svd", rank=3)
    reason = "a convolution in 16 groups of one input channel each: there is nothing to share between channels"
    assert {d.name: d.keep for d in done.plan.decisions} == {"depthwise": reason, "down": None}


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_group_is_decomposed_by_itself(solver: Any, compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["grouped"], solver=solver, rank=3)
    (decision,) = done.plan.decisions
    made = done.program.maps["grouped"]
    assert repr(made) == decision.after.text == "ConvChain([16,3,1x1], [12,4,3x3])"
    assert (decision.rank, decision.full_rank) == (3, 4)
    assert decision.after.parameters == 3 * (16 + 4 * 36) + 16
    assert 0 < changed(model, done, x) < 0.2
    if solver == "svd":  # the loss of every group by itself
        weight = model.grouped.weight.detach().double().flatten(1)  # type: ignore[union-attr, operator]
        lost = [float(torch.linalg.svdvals(block)[3:].square().sum()) for block in weight.chunk(4)]
        assert decision.predicted == pytest.approx(sum(lost), rel=1e-6)
        assert float((made.exact().weight - weight).square().sum()) == pytest.approx(sum(lost), rel=1e-5)


def test_groups_of_a_whole_convolution_are_those_of_separate_ones(compiled: Compile) -> None:
    """Two groups against two convolutions on halves of the channels: the same statistics, the same products."""

    class Halves(nn.Module):
        def __init__(self, whole: nn.Conv2d | None = None) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)]) if whole else None
            self.whole = None if whole else nn.Conv2d(6, 8, 3, groups=2)
            for i, part in enumerate(self.parts or ()):
                part.weight.data, part.bias.data = whole.weight.data.chunk(2)[i], whole.bias.data.chunk(2)[i]  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            if self.parts is None:
                return self.whole(x)  # type: ignore[misc]
            return torch.cat([part(half) for part, half in zip(self.parts, x.chunk(2, 1), strict=True)], 1)

    torch.manual_seed(0)
    one = Halves()
    two, items = Halves(one.whole), [{"x": torch.randn(8, 6, 7, 7)} for _ in range(2)]
    for solver in ("svd", "whitened", "afm"):
        done = [compiled(m, inputs=items[0]["x"], calibration=items, solver=solver, rank=2) for m in (one.eval(), two.eval())]
        with torch.no_grad():
            x = torch.randn(4, 6, 7, 7)
            assert torch.allclose(done[0].module(x), done[1].module(x), atol=1e-5)


@pytest.mark.parametrize("rank", [{"params_kept": 0.6}, {"flops_kept": 0.6}, {"fraction": 0.5}, {"energy": 0.6}])
def test_budgets_count_groups_as_they_are(rank: Any, compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["grouped"], solver="whitened", rank=rank)
    (decision,) = done.plan.decisions
    made = done.program.maps["grouped"]
    assert decision.after.parameters == sum(p.numel() for p in made.parameters())
    if "kept" in str(rank):
        assert decision.after.parameters <= 0.6 * decision.before.parameters + (1 if "params" in str(rank) else 99)
    again = compiled(model, inputs=x, calibration=items, targets=["grouped"], solver="whitened", rank=rank)
    assert torch.equal(again.module(x), done.module(x))  # from the cache


def test_a_form_that_a_convolution_has_not_is_noted(compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["down"], solver="svd", rank=3, form="pivoted")
    (decision,) = done.plan.decisions
    assert (decision.form, decision.notes) == ("two_factor", ("no pivoted form of a conv",))


def test_the_bare_pattern_leaves_embeddings(compiled: Compile) -> None:
    model, ids, items = words()
    everything = compiled(model, inputs=ids, calibration=items, targets=["**"], solver="svd", rank=2)
    assert [d.name for d in everything.plan.decisions] == ["fc"]
    typed = compiled(model, inputs=ids, calibration=items, targets=["type:Embedding"], solver="svd", rank=2)
    assert [d.name for d in typed.plan.decisions] == ["table"]


def test_the_padding_row_stays_zero_without_centring(compiled: Compile) -> None:
    model, ids, items = words()
    for solver in ("svd", "kfac", {"type": "afm", "center": False}):
        done = compiled(model, inputs=ids, calibration=items, targets=["table"], solver=solver, rank=3)
        with torch.no_grad():
            assert float(done.program.maps["table"](torch.tensor([0])).abs().max()) < 1e-6


def test_merge_folds_them_back(compiled: Compile) -> None:
    model, x, items = images()
    done = compiled(model, inputs=x, calibration=items, targets=["down", "grouped"], solver="svd", rank=3)
    folded = lrc.compile(done.program, {"version": 1, "passes": [{"type": "merge", "dense": True}]})
    assert isinstance(folded.program.maps["down"], Conv)
    assert repr(folded.program.maps["grouped"]) == "Conv[16,4,3x3]"
    with torch.no_grad():
        assert torch.allclose(folded.module(x), done.module(x), atol=1e-6)
    model, ids, items = words()
    done = compiled(model, inputs=ids, calibration=items, targets=["table"], solver="afm", rank=3)
    folded = lrc.compile(done.program, {"version": 1, "passes": [{"type": "merge", "dense": True, "targets": ["table"]}]})
    assert isinstance(folded.program.maps["table"], Lookup)
    with torch.no_grad():
        assert torch.allclose(folded.module(ids), done.module(ids), atol=1e-6)


def test_kfac_damps_the_gradients_of_a_convolution_less(compiled: Compile) -> None:
    model, x, items = images()
    for target, damping in (("down", 0.1), ("head", 1.0)):
        step: dict[str, Any] = {"inputs": x, "calibration": items, "targets": [target], "rank": 3, "form": "two_factor"}
        ours = compiled(model, solver="kfac", **step)
        told = compiled(model, solver={"type": "kfac", "damping_out": damping}, **step)
        other = compiled(model, solver={"type": "kfac", "damping_out": 0.5}, **step)
        assert ours.plan.decisions[0].predicted == told.plan.decisions[0].predicted != other.plan.decisions[0].predicted
