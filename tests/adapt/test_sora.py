"""sora: a gate between the factors; closed components can be dropped without a change."""

import pytest
import torch
from adapted import adapted, case, distance, merged, train, trained

from lrc.maps import Gate, low_rank, simplify

F64 = torch.float64


def test_the_branch_is_gated_and_counts_one_number_more_a_component() -> None:
    made = adapted(case(), targets=["tall"], method="sora").program.maps["tall"]
    assert repr(made) == "Sum(Dense[20,8]*, Scale(2, Chain(Dense[20,8], Gate[8], Dense[8,8])))"
    assert trained(made) == 8 * (20 + 8) + 8
    B, gate, A = made.adapter.inner.slots
    assert torch.equal(B, torch.zeros(20, 8))
    assert A.abs().max() <= 1 / 8**0.5
    assert gate.diagonal.std() > 0.2


@pytest.mark.parametrize("fqn", ["tall", "wide", "row", "column", "conv", "table"])
def test_dropping_closed_components_keeps_the_output_and_the_constant(fqn: str) -> None:
    it = case(F64)
    made = adapted(it, targets=[fqn], method="sora", rank=4, alpha=12.0)
    train(made.program)
    adapter = made.program.maps[fqn]
    gate = next(part for part in adapter.modules() if isinstance(part, Gate))
    with torch.no_grad():
        gate.diagonal[[0, 2]] = 0
    lora = low_rank(adapter.slots[1])
    assert lora is not None
    assert (lora.rank, lora.scale) == (2, 3.0)  # alpha' = alpha |kept| / r_max, so that alpha' / r' = alpha / r_max
    branch, notes = simplify(adapter.slots[1])
    assert any("drop closed gates" in note for note in notes)
    m, n = adapter.out_features, adapter.in_features
    assert branch.cost().parameters <= 2 * (m + n)
    assert torch.allclose(branch.exact().weight, adapter.slots[1].exact().weight, rtol=0, atol=1e-13)
    expected = made.module(**it.inputs)
    assert distance(merged(made, it).module(**it.inputs), expected) < 1e-12
    with torch.no_grad():
        gate.diagonal.zero_()
    assert distance(merged(made, it).module(**it.inputs), it.model(**it.inputs)) < 1e-12


def test_a_closed_gate_still_has_a_gradient_and_its_factors_have_none() -> None:
    made = adapted(case(F64), targets=["tall"], method="sora", rank=3, alpha=6.0)
    train(made.program)
    adapter = made.program.maps["tall"]
    B, gate, A = adapter.adapter.inner.slots
    with torch.no_grad():
        gate.diagonal[1] = 0
    x = torch.randn(5, 8, dtype=F64)
    y = adapter(x)
    y.square().sum().backward()
    dy = 2 * y.detach()
    expected = 2.0 * ((x @ A[1].detach()) * (dy @ B[:, 1].detach())).sum()
    assert torch.allclose(gate.diagonal.grad[1].double(), expected, rtol=1e-6)
    assert B.grad[:, 1].abs().max() == 0
    assert A.grad[1].abs().max() == 0
    assert B.grad[:, 0].abs().max() > 0


def test_a_closed_gate_comes_back_only_by_steps_above_the_threshold() -> None:
    from lrc.train.optim.proximal import soft_threshold

    step, gate = 8e-4, torch.zeros(3, dtype=F64)
    assert torch.equal(soft_threshold(gate - step, 1e-3), gate)  # the step of Adam is smaller than xi: it stays closed
    assert torch.allclose(soft_threshold(gate - step, 3e-4), torch.full((3,), -5e-4, dtype=F64))
    v = torch.linspace(-1, 1, 41, dtype=F64)
    assert torch.allclose(soft_threshold(soft_threshold(v, 0.2), 0.13), soft_threshold(v, 0.33), rtol=0, atol=1e-15)


def test_open_gates_of_one_are_plain_lora() -> None:
    it = case()
    ours = adapted(it, targets=["tall"], method={"type": "sora", "gate": "ones"}, rank=3)
    theirs = adapted(it, targets=["tall"], method="lora", rank=3)
    for mine, other in (("tall.adapter.inner.A", "tall.adapter.inner.A"), ("tall.adapter.inner.B", "tall.adapter.inner.B")):
        assert torch.equal(ours.program.graph_module.get_parameter(mine), theirs.program.graph_module.get_parameter(other))


def test_gates_are_float32_in_a_model_of_16_bits() -> None:
    made = adapted(case(torch.bfloat16), targets=["tall", "conv"], method="sora", rank=3)
    gates = [part for adapter in made.program.maps.values() for part in adapter.modules() if isinstance(part, Gate)]
    assert {gate.diagonal.dtype for gate in gates} == {torch.float32}
    assert len(gates) == 2
