"""flora: a Tucker core beside the weight, for linears, convolutions in groups too, and tables."""

import pytest
import torch
from adapted import adapted, case, distance, merged, train, trained
from torch import nn

from lrc.maps import Conv, LinearMap, Sum, Tucker, low_rank

F64 = torch.float64


def test_a_linear_is_f1_core_f0_and_counts_r_squared_more_than_lora() -> None:
    it = case(F64)
    made = adapted(it, targets=["tall"], method="flora", rank=4, alpha=0.25)
    train(made.program)
    adapter = made.program.maps["tall"]
    F1, G, F0 = adapter.adapter.inner.slots
    assert trained(adapter) == 4**2 + 4 * (20 + 8)
    delta = adapter.exact().weight - it.model.tall.weight
    assert torch.allclose(delta, 0.25 * F1 @ G @ F0, rtol=0, atol=1e-13)
    with torch.no_grad():
        G.copy_(torch.eye(4, dtype=F64))
    lora = low_rank(adapter.adapter)
    assert lora is not None
    assert torch.allclose(lora.B @ lora.A, F1.detach() @ F0.detach())


def test_at_the_start_the_core_alone_has_a_gradient() -> None:
    for fqn in ("tall", "conv", "table"):
        it = case(F64)
        made = adapted(it, targets=[fqn], method="flora", rank=3)
        sum(y.square().sum() for y in made.module(**it.inputs)).backward()
        grads = {name: p.grad for name, p in made.program.maps[fqn].named_parameters() if p.requires_grad}
        moving = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
        assert len(grads) in (3, 5)
        assert moving in ({"adapter.inner.G"}, {"adapter.inner.R"}, {"adapter.inner.R.weight"}), fqn


def test_factors_start_with_variance_one_over_twice_the_rank() -> None:
    model = nn.Linear(3000, 4)
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 3000)})
    made = adapted(it, targets=["**"], method={"type": "flora", "out_rank": 2}, rank=8)
    (adapter,) = made.program.maps.values()
    F0 = adapter.adapter.inner.slots[2]
    assert F0.shape == (8, 3000)
    assert float(F0.detach().std()) == pytest.approx((0.5 / 8) ** 0.5, rel=0.02)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", [{"stride": 2, "padding": 1, "dilation": 2}, {"stride": (1, 3), "padding": (2, 0)}])
def test_the_merged_convolution_is_the_sum_of_both(groups: int, geometry: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, (3, 2), groups=groups, **geometry).double().eval()
    it = case()._replace(model=model, inputs={"input": torch.randn(2, 4, 11, 10, dtype=F64)})
    made = adapted(it, targets=["**"], method="flora", rank=2)
    train(made.program, 0.3)
    (adapter,) = made.program.maps.values()
    tucker = next(part for part in adapter.modules() if isinstance(part, Tucker))
    kernel = torch.einsum("abcd,ia,ob,hc,wd->oihw", tucker.G, *tucker.factors)
    x = it.inputs["input"]
    expected = adapter.base.geometry(x, model.weight + kernel, model.bias)
    assert torch.allclose(adapter(x), expected, rtol=0, atol=1e-12)
    after = merged(made, case()._replace(model=model, inputs=it.inputs))
    (folded,) = after.program.maps.values()
    assert isinstance(folded, Conv)
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-12)


def test_the_count_of_a_large_convolution_is_the_cards() -> None:
    model = nn.Conv2d(384, 384, 3, padding=1, bias=False)
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 384, 4, 4)})
    made = adapted(it, targets=["**"], method="flora", rank=16)
    (adapter,) = made.program.maps.values()
    assert trained(adapter) == 1024 + 6144 + 6144 + 6 + 6 == 13_324
    theirs = adapted(it, targets=["**"], method="lora", rank=16)
    assert trained(next(iter(theirs.program.maps.values()))) == 61_440


def test_a_kernel_rank_of_one_is_separable_and_ranks_above_a_size_are_noted() -> None:
    it = case(F64)
    made = adapted(it, targets=["conv"], method={"type": "flora", "kernel_rank": 1}, rank=5)
    train(made.program)
    adapter = made.program.maps["conv"]
    assert isinstance(adapter, Sum)
    kernel = (adapter.exact().weight - it.model.conv.weight.flatten(1)).reshape(6, 3, 3, 2)
    assert torch.linalg.matrix_rank(kernel.flatten(0, 1).flatten(1)) <= 3 * 5
    assert torch.linalg.matrix_rank(kernel.permute(2, 0, 1, 3).flatten(1)) == 1
    (note,) = made.plan.decisions[0].notes
    assert note == "ranks 3,5,1,1 (in, out, kernel): no dimension has more than its size"


def test_a_table_is_adapted_by_rows() -> None:
    it = case(F64)
    made = adapted(it, targets=["table"], method="flora", rank=3)
    train(made.program)
    adapter = made.program.maps["table"]
    ids = it.inputs["ids"]
    change = adapter(ids) - it.model.table(ids)
    assert change.abs().max() > 0
    assert distance([change], [adapter.slots[1](ids)]) < 1e-12
    F1, G, F0 = (part.exact().weight if isinstance(part, LinearMap) else part for part in adapter.adapter.inner.slots)
    assert torch.allclose(change, (F1 @ G @ F0).T[ids], rtol=0, atol=1e-12)
