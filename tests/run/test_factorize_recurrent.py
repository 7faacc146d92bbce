"""factorize on recurrent layers: every solver, both views, and the files."""

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
from lrc.program import Program

Compile = Callable[..., lrc.Compiled]
SOLVERS: list[Any] = ["svd", "asvd", "fwsvd", "kfac", {"type": "kfac", "propagate": "compressed"}]


class Reader(nn.Module):
    """A bidirectional GRU, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 16, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc(self.rnn(x)[0])
        return made


def reader() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    items = [{"x": torch.randn(8, 5, 12)} for _ in range(3)]
    return Reader().eval(), items[0], items[1:]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_rewrites_both_weights_of_a_layer(solver: Any, compiled: Compile) -> None:
    model, inputs, items = reader()
    done = compiled(model, inputs=inputs, calibration=items, targets=["type:GRU"], solver=solver, rank=5)
    assert len(done.program.maps) == 4
    assert done.plan.parameters[1] < 0.8 * done.plan.parameters[0]
    noted = {d.sites[0]: any(note.startswith("multiplied out where") for note in d.notes) for d in done.plan.decisions}
    assert noted == {name: "_hh_" in name for name in noted}
    with torch.no_grad():
        expected = done.program(**inputs)["output"]
        assert torch.allclose(done.graft()(**inputs), expected, atol=1e-5)
        assert 0 < float((expected - model(**inputs)).norm() / model(**inputs).norm()) < 0.7


def test_a_layer_that_stays_dense_stays_one_operator(compiled: Compile) -> None:
    model, inputs, items = reader()
    done = compiled(model, inputs=inputs, calibration=items, targets=["**"], ignore=["rnn.**"], solver="kfac", rank=2)
    assert list(done.program.maps) == ["fc"]
    assert "= gru(" in str(done.program)
    assert "loop" not in str(done.program)
    assert "= gru(" in str(done.dense)


@pytest.mark.slow  # torch.export compiles every loop
def test_the_files_compute_the_same(compiled: Compile, tmp_path: Path) -> None:
    model, inputs, items = reader()
    done = compiled(model, inputs=inputs, calibration=items, targets=["rnn.**"], solver="svd", rank=4)
    with torch.no_grad():
        expected = done.program(**inputs)["output"]
    done.save(tmp_path / "out")
    loaded = lrc.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs)["output"], expected, atol=1e-6)
    path = done.to_onnx(tmp_path / "model.onnx")
    assert torch.allclose(torch.as_tensor(OrtRunner(path)(**inputs)["output"]), expected, atol=1e-5)
    assert kinds_of(path).count("GRU") == 2  # small, so multiplied out
    assert "Scan" not in kinds_of(path)


def kinds_of(path: Path) -> list[str]:
    """The operators of an ONNX file."""
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["two_factor", "auto"])
def test_a_large_hidden_weight_is_a_scan_in_onnx_and_one_direction_alone_may_be(
    form: str, compiled: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, _ = reader()
    done = compiled(
        model, inputs=inputs, targets=["rnn.**"], ignore=["*.weight_hh_l0_reverse"], solver="svd", rank=4, form=form
    )
    monkeypatch.setattr("lrc.maps.fused_recurrence.SMALL", 100)  # the dense one is none of factors
    path = done.to_onnx(tmp_path / "model.onnx")
    assert (kinds_of(path).count("Scan"), kinds_of(path).count("GRU")) == (1, 1)
    with torch.no_grad():
        expected = done.program(**inputs)["output"]
    assert torch.allclose(torch.as_tensor(OrtRunner(path)(**inputs)["output"]), expected, atol=1e-5)


def test_a_budget_of_time_refuses_what_is_timed_step_by_step(compiled: Compile) -> None:
    model, inputs, items = reader()
    with pytest.raises(SiteError, match="its time is that of a loop"):
        compiled(model, inputs=inputs, calibration=items, targets=["rnn.**"], solver="svd", rank={"latency_kept": 0.7})


def test_flops_count_every_step(compiled: Compile) -> None:
    model, inputs, items = reader()
    done = compiled(model, inputs=inputs, calibration=items, targets=["rnn.**"], solver="svd", rank={"flops_kept": 0.5})
    assert isinstance(done.program, Program)
    (line,) = [note for note in done.plan.notes if note.startswith("FLOPs of the targets")]
    assert f"{5 * 2 * (2 * 48 * (12 + 16) + 2 * 48):.4g} →" in line


def test_the_rewritten_graph_reads_as_the_golden_text(compiled: Compile, golden: Callable[[str, str], None]) -> None:
    model, inputs, items = reader()
    done = compiled(model, inputs=inputs, calibration=items, targets=["rnn.weight_hh_l0*"], solver="svd", rank=2)
    golden("factorize_recurrent", str(done.program))
