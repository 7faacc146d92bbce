"""factorize and merge on embeddings of bags."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import SiteError
from lrc.lower.ort import OrtRunner
from lrc.maps import Bag, Chain

Compile = Callable[..., lrc.Compiled]
SOLVERS: list[Any] = ["svd", "whitened", "afm", "kfac", {"type": "kfac", "propagate": "compressed"}]


class Clicks(nn.Module):
    """Bags of one size, and a linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(40, 12, **options)
        self.fc = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.table(ids))


class Ragged(nn.Module):
    """Weighted bags of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(40, 12, mode="sum")
        self.fc = nn.Linear(12, 4)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return self.fc(self.table(ids, offsets, weights))


def clicks(**options: Any) -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    given = [{"ids": torch.randint(0, 40, (n, 6))} for n in (4, 32, 32)]
    return Clicks(**options).eval(), given[0], given[1:]


def ragged() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    given = [
        {"ids": torch.randint(0, 40, (70,)), "offsets": torch.arange(0, 70, 5), "weights": torch.rand(70)} for _ in range(3)
    ]
    return Ragged().eval(), given[0], given[1:]


def changed(model: nn.Module, done: lrc.Compiled, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float((done.module(**inputs) - model(**inputs)).norm() / model(**inputs).norm())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_rewrites_bags(solver: Any, compiled: Compile) -> None:
    for make in (clicks, ragged):
        model, inputs, items = make()
        done = compiled(model, inputs=inputs, calibration=items, targets=["table"], solver=solver, rank=8)
        made = done.program.maps["table"]
        assert isinstance(made, Chain)
        assert isinstance(made.slots[1], Bag)
        assert 0 < changed(model, done, inputs) < 0.5
        assert done.plan.parameters[1] == done.plan.parameters[0] - 40 * 12 + 8 * 52 + (0 if made.bias is None else 12)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_afm_keeps_the_mean_where_the_counts_of_a_bag_are_shares(mode: str, compiled: Compile) -> None:
    model, inputs, items = clicks(mode=mode)
    done = compiled(model, inputs=inputs, calibration=items, targets=["table"], solver="afm", rank=6)
    (decision,) = done.plan.decisions
    noted = "the mean output stays in: the counts of a bag do not sum to 1" in decision.notes
    assert noted == (mode == "sum")
    assert (done.program.maps["table"].bias is None) == noted


def test_a_calibrated_table_of_bags_beats_its_own_spectrum(compiled: Compile) -> None:
    model, inputs, items = clicks(padding_idx=0)
    skewed = [{"ids": item["ids"] % 7} for item in items]
    plain = compiled(model, inputs=inputs, calibration=skewed, targets=["table"], solver="svd", rank=4)
    ours = compiled(model, inputs=inputs, calibration=skewed, targets=["table"], solver="kfac", rank=4)
    assert changed(model, ours, skewed[0]) < 0.9 * changed(model, plain, skewed[0])


def test_both_views_and_the_files_compute_the_same(compiled: Compile, tmp_path: Path) -> None:
    cases = {"mean": clicks(padding_idx=3), "sum": clicks(mode="sum"), "ragged": ragged()}
    for name, (model, inputs, items) in cases.items():
        done = compiled(model, inputs=inputs, calibration=items, targets=["table"], solver="kfac", rank=3)
        with torch.no_grad():
            expected = done.program(**inputs)["output"]
            assert torch.equal(done.graft()(*inputs.values()), expected)
            assert torch.equal(done.graft()(**inputs), expected)
        done.save(tmp_path / name)
        loaded = lrc.load(tmp_path / name)
        with torch.no_grad():
            assert torch.allclose(loaded(**inputs)["output"], expected, atol=1e-6)
        runner = OrtRunner(done.to_onnx(tmp_path / f"{name}.onnx"))
        assert torch.allclose(torch.as_tensor(runner(**inputs)["output"]), expected, atol=1e-5)
        kinds = {node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node}
        assert ("Loop" in kinds) == (name == "ragged")


def test_the_rewritten_graph_reads_as_the_golden_text(compiled: Compile, golden: Callable[[str, str], None]) -> None:
    model, inputs, items = ragged()
    done = compiled(model, inputs=inputs, calibration=items, targets=["table"], solver="svd", rank=2)
    golden("factorize_bag", str(done.program))


def test_merge_gives_the_table_back(compiled: Compile) -> None:
    model, inputs, items = ragged()
    done = compiled(model, inputs=inputs, calibration=items, targets=["table"], solver="svd", rank=7)
    with torch.no_grad():
        expected = done.program(**inputs)["output"]
    merged = lrc.compile(done.program, {"version": 1, "passes": [{"type": "merge", "targets": ["table"], "dense": True}]})
    assert isinstance(merged.program.maps["table"], Bag)
    with torch.no_grad():
        assert torch.allclose(merged.program(**inputs)["output"], expected, atol=1e-5)


def test_a_maximum_stays_with_the_reason(compiled: Compile) -> None:
    model, inputs, items = clicks(mode="max")
    done = compiled(model, inputs=inputs, calibration=items, targets=["table", "fc"], solver="kfac", rank=2)
    reasons = {d.name: d.keep for d in done.plan.decisions}
    assert reasons == {"table": "the maximum over a bag is no product with a matrix", "fc": None}


def test_a_budget_of_time_cannot_tell_how_large_bags_are(compiled: Compile) -> None:
    model, inputs, items = ragged()
    with pytest.raises(SiteError, match=r"table: its time depends on how large the bags are\. Choose a budget"):
        compiled(model, inputs=inputs, calibration=items, targets=["table"], solver="svd", rank={"latency_kept": 0.9})
