"""factorize on experts: 3-D weights of `torch.bmm`, whole or selected by index, in both views."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.data import batches_of
from lrc.errors import LrcError
from lrc.maps import Experts
from lrc.measure import collect
from lrc.solvers import Need

Compile = Callable[..., lrc.Compiled]


class Banks(nn.Module):
    """Two products of every expert with rows of its own: stored as (experts, in, out), and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 16))
        self.down = nn.Parameter(torch.randn(3, 10, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.transpose(0, 1), self.up).relu()
        return torch.bmm(hidden, self.down.transpose(1, 2)).transpose(0, 1)


class Routed(nn.Module):
    """Every row goes to the expert of its largest entry, as `batched_mm` of transformers does it."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, :3].argmax(1)
        made: Tensor = torch.bmm(self.bank[ids], x.unsqueeze(-1)).squeeze(-1)
        return made


def banks() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    items = [{"x": torch.randn(8, 3, 12) * torch.linspace(0.1, 2, 12)} for _ in range(3)]
    return Banks().eval(), items[0], items


def routed() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    items = [{"x": torch.randn(16, 12) * torch.linspace(2, 0.1, 12)} for _ in range(3)]
    return Routed().eval(), items[0], items


MODELS = pytest.mark.parametrize("make", [banks, routed])


@MODELS
@pytest.mark.parametrize("solver", ["svd", "whitened", "kfac", "gram"])
def test_every_solver_rewrites_experts(make: Any, solver: str, compiled: Compile) -> None:
    model, inputs, items = make()
    done = compiled(model, inputs=inputs, calibration=items, solver=solver, rank=4)
    assert all(isinstance(made, Experts) for made in done.program.maps.values())
    assert len(done.program.maps) == sum(1 for _ in model.parameters())
    assert done.plan.parameters[1] < done.plan.parameters[0]
    with torch.no_grad():
        expected = done.program(**inputs)["output"]
        assert torch.allclose(done.graft()(**inputs), expected, atol=1e-5)
        assert 0 < float((expected - model(**inputs)).norm() / model(**inputs).norm()) < 1


@MODELS
def test_full_rank_is_the_dense_model(make: Any, compiled: Compile) -> None:
    model, inputs, _ = make()
    program = lrc.capture(model, inputs)
    for site in list(program.sites.values()):
        weight = site.map.dense().weight.reshape(3, -1, site.in_features).double()
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        B, A = (U * S[:, None]).flatten(0, 1).float(), V.movedim(1, 0).float()
        program.replace(site.fqn, site.layout.product(B, A, None), "test")
    assert torch.allclose(program(**inputs)["output"], model(**inputs), atol=1e-4)


def test_gradients_are_those_of_factors_one_by_one() -> None:
    torch.manual_seed(0)
    made = Experts([torch.randn(3, 5, 2), torch.randn(3, 2, 4)])
    x, ids = torch.randn(7, 4), torch.tensor([0, 2, 2, 1, 0, 2, 2])
    B, A = made.factors
    alone = torch.stack([B[e] @ (A[e] @ row) for e, row in zip(ids, x, strict=True)])
    assert torch.allclose(made(x, ids=ids), alone, atol=1e-5)
    given = torch.autograd.grad(made(x, ids=ids).square().sum(), made.factors)
    for one, other in zip(given, torch.autograd.grad(alone.square().sum(), made.factors), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    dense = made.exact().weight.reshape(3, 5, 4)
    assert torch.allclose(torch.einsum("noi,ni->no", dense[ids], x.double()), alone.double(), atol=1e-5)


def test_moments_are_those_of_the_rows_of_every_expert() -> None:
    model, inputs, items = routed()
    program = lrc.capture(model, inputs)
    needs = frozenset({Need.INPUTS, Need.GRADIENTS})
    found = collect(program, batches_of(items, ["x"]), ["bank"], needs, fisher="outputs")["bank"]
    x = torch.cat([item["x"] for item in items]).double()
    ids = x[:, :3].argmax(1)
    assert found.gram is not None
    assert found.fisher is not None
    for expert in range(3):
        mine = x[ids == expert]
        assert torch.allclose(found.gram[expert], mine.T @ mine / len(x), atol=1e-5)
    assert found.fisher.shape == (3, 10, 10)
    assert found.weighted_gram is not None
    assert found.weighted_gram.shape == (3, 12, 12)


@MODELS
def test_whitened_beats_svd_on_its_own_norm(make: Any, compiled: Compile) -> None:
    model, inputs, items = make()
    site = "bank" if make is routed else "up"
    errors = {}
    for solver in ("svd", "whitened"):
        done = compiled(model, inputs=inputs, calibration=items, targets=[site], solver=solver, rank=3)
        made, gram = done.program.maps[site].dense().weight, None
        program = lrc.capture(model, inputs)
        gram = collect(program, batches_of(items, ["x"]), [site], frozenset({Need.INPUTS}))[site].gram
        assert gram is not None
        change = (program.sites[site].map.dense().weight - made).reshape(3, -1, 12).double()
        errors[solver] = float(torch.einsum("eoi,eij,eoj->", change, gram, change))
    assert errors["whitened"] < 0.95 * errors["svd"]


@MODELS
def test_a_budget_of_parameters_is_kept(make: Any, compiled: Compile) -> None:
    model, inputs, items = make()
    done = compiled(model, inputs=inputs, calibration=items, solver="whitened", rank={"params_kept": 0.7})
    before = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() for p in done.program.graph_module.parameters())
    assert held == done.plan.parameters[1] <= 0.7 * before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"solver": "asvd", "rank": 3}, "samples one by one"),
        ({"solver": "svd", "rank": {"latency_kept": 0.7}}, "how many rows each expert gets"),
        ({"solver": {"type": "whitened", "center": True}, "rank": 3}, "no bias that could carry a mean"),
    ],
)
def test_what_experts_cannot_do_is_refused(options: Mapping[str, Any], error: str, compiled: Compile) -> None:
    model, inputs, items = routed()
    with pytest.raises(LrcError, match=error):
        compiled(model, inputs=inputs, calibration=items, **options)


def test_adapters_are_refused() -> None:
    model, inputs, _ = routed()
    spec = {"version": 1, "passes": [{"type": "adapt", "targets": ["bank"], "method": "lora"}]}
    done = lrc.compile(model, spec, inputs=inputs)
    assert not done.program.maps
    assert "experts" in str(done.report)


def test_a_map_in_the_place_of_a_tensor_is_multiplied_and_nothing_else(compiled: Compile) -> None:
    model, inputs, items = routed()
    bank: Any = compiled(model, inputs=inputs, calibration=items, solver="svd", rank=4).graft().bank
    with pytest.raises(TypeError, match="not read by `sum`"):
        torch.sum(bank)
