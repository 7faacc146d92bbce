"""fold_norms: equal outputs without the batch norm, in every view."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.lower.hf_folder import HfExport, export_hf, load_model
from lrc.lower.ort import OrtRunner

FOLD = {"type": "fold_norms"}


class Normed(nn.Module):
    """Batch norms after convolutions with and without a bias, in groups, after a linear, and where none can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.point = nn.Conv2d(8, 6, 1)
        self.read_twice = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.last = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(self.bare(self.depthwise(torch.relu(self.norm(self.conv(x))))))
        h = h + self.read_twice(h)
        return self.head(self.last(self.fc(h.mean((2, 3)))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Normed().eval().requires_grad_(False)
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if any(word in name for word in ("norm", "bare", "read_twice", "last")) and tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return made


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def folded(model: Any, *passes: dict[str, Any], **options: Any) -> lrc.Compiled:
    return lrc.compile(model, {"version": 1, "passes": [FOLD, *passes]}, inputs=X, **options)


def test_the_rewritten_graph_reads_as_the_golden_text(model: nn.Module, golden: Callable[[str, str], None]) -> None:
    golden("fold_norms", str(folded(model).program))


@torch.no_grad()
def test_outputs_are_equal_to_rounding_in_every_view(model: nn.Module, tmp_path: Path) -> None:
    done, expected = folded(model), model(X)
    atol = 1e-5 * float(expected.abs().max())
    graft = done.graft()
    assert torch.allclose(done.module(X), expected, atol=atol)
    assert torch.allclose(graft(X), expected, atol=atol)
    assert isinstance(graft.norm, nn.Identity)
    assert isinstance(model.norm, nn.BatchNorm2d)
    done.save(tmp_path / "saved")
    assert torch.allclose(lrc.load(tmp_path / "saved")(x=X)["output"], expected, atol=atol)
    onnx = OrtRunner(done.to_onnx(tmp_path / "model.onnx"))
    assert torch.allclose(torch.as_tensor(onnx(x=X)["output"]), expected, atol=10 * atol)


def test_every_site_is_folded_or_says_why_not(model: nn.Module) -> None:
    done = folded(model)
    reasons = {d.name: d.keep for d in done.plan.decisions}
    assert reasons == {
        "conv": None, "depthwise": None, "point": "2 operations read what it gives, not the batch norm alone",
        "fc": None, "head": "no batch norm follows",
    }  # fmt: skip
    assert done.program.idle == ("norm", "bare", "last")
    assert done.plan.decisions[0].notes == ("the batch norm norm is folded",)
    planned = lrc.plan(model, {"version": 1, "passes": [FOLD]}, inputs=X)
    assert (planned.parameters, planned.bytes) == (done.plan.parameters, done.plan.bytes)
    before = sum(d.before.parameters - d.after.parameters for d in done.plan.decisions)
    assert done.plan.parameters[0] - done.plan.parameters[1] == before == 24 + 16 + 20


def test_a_second_time_changes_nothing(model: nn.Module) -> None:
    once, twice = folded(model), folded(model, FOLD)
    assert str(once.program) == str(twice.program)
    assert all(d.keep for d in twice.plan.of_pass(1))


@torch.no_grad()
def test_what_is_folded_is_factorized_with_its_new_bias(model: nn.Module) -> None:
    step = {"type": "factorize", "targets": ["conv", "fc"], "solver": "whitened", "rank": 2, "form": "two_factor"}
    done = folded(model, step, calibration=[{"x": torch.randn(16, 3, 9, 9)} for _ in range(2)])
    conv = done.program.maps["conv"]
    assert conv.bias is not None
    assert done.plan.of_pass(1)[0].after.parameters == 2 * (27 + 8) + 8
    assert torch.equal(done.graft()(X), done.module(X))
    factors = lrc.compile(model, {"version": 1, "passes": [{**step, "solver": "svd"}, FOLD]}, inputs=X)  # the other way round
    kept = lrc.compile(model, {"version": 1, "passes": [{**step, "solver": "svd"}]}, inputs=X)
    assert factors.program.idle == ("norm", "bare", "last")
    assert torch.allclose(factors.module(X), kept.module(X), atol=1e-5 * float(kept.module(X).abs().max()))


def test_a_norm_that_is_shared_or_over_another_dimension_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    for made, x, reason in (
        (Shared(), torch.randn(3, 4), "the batch norm norm is used more than once"),
        (Sequence(), torch.randn(3, 7, 4), "the batch norm is not over the features of the linear"),
    ):
        done = lrc.compile(made.eval(), {"version": 1, "passes": [FOLD]}, inputs=x)
        assert {d.keep for d in done.plan.decisions} == {reason}
        assert done.program.idle == ()


@torch.no_grad()
def test_a_transformers_folder_has_an_identity_where_the_norm_was(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="skipped: transformers is not installed")
    sizes: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": 3,
    }
    torch.manual_seed(0)
    made = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_channels=3, **sizes)).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 32, 32)
    program = lrc.capture(made, inputs={"pixel_values": x})
    step = {"type": "factorize", "solver": "svd", "rank": {"params_kept": 0.7}, "targets": ["type:Conv2d"]}
    done = lrc.compile(program, {"version": 1, "passes": [FOLD, step]})
    assert not any(isinstance(module, nn.BatchNorm2d) for module in done.graft().modules())
    export_hf(done.program, tmp_path / "saved", HfExport())
    loaded, expected = load_model(tmp_path / "saved"), done.program(x)["logits"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    atol = 1e-5 * float(expected.abs().max())
    assert torch.allclose(loaded(pixel_values=x).logits, expected, atol=atol)
    again = lrc.capture(loaded, inputs={"pixel_values": x})
    dense = lrc.compile(again, {"version": 1, "passes": [{"type": "merge", "dense": True}]})
    export_hf(dense.program, tmp_path / "again", HfExport())
    assert torch.allclose(load_model(tmp_path / "again")(pixel_values=x).logits, expected, atol=10 * atol)
