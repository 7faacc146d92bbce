"""The optimisers that project no gradient: Adam, proximal steps, Riemannian scaling, updates inside the backward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lrc.spec.registry import OPTIMIZERS
from lrc.train.optim import (
    Adam,
    GaLore,
    PerLayer,
    ProximalAdamW,
    ProximalSGD,
    RiemannianAdamW,
    Trained,
    reference_threshold,
    soft_threshold,
)
from lrc.train.optim.quantized import Codes, dequantize, levels, quantize

numbers = st.floats(-3, 3, allow_nan=False, width=32)


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 4), (4,), (4, 6))]


def run(optimizer: torch.optim.Optimizer, given: list[nn.Parameter], steps: int = 5) -> None:
    """Train a small network on noise."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(given, generator).backward()
        optimizer.step()


def loss_of(given: list[nn.Parameter], generator: torch.Generator) -> Tensor:
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 6, generator=generator)
    return ((torch.tanh(x @ given[0] + given[1]) @ given[2] - y) ** 2).mean()


def test_adam_with_a_vanishing_eps_is_torchs_adam() -> None:
    a, b = parameters(), parameters()
    run(Adam(a, lr=0.01, eps=0.0), a)
    run(torch.optim.Adam(b, lr=0.01, eps=0.0), b)
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(a, b, strict=True))


@given(values=st.lists(numbers, min_size=1, max_size=20), xi=st.floats(0, 2, width=32))
def test_the_soft_threshold_minimises_its_objective_and_never_expands(values: list[float], xi: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    found = soft_threshold(v, xi)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    at_grid = ((grid - v) ** 2 / 2 + xi * grid.abs()).amin(0)
    assert bool(((found - v) ** 2 / 2 + xi * found.abs() <= at_grid + 1e-9).all())
    assert bool((found[v.abs() <= xi] == 0.0).all())
    other = v.flip(0)
    assert bool(((soft_threshold(other, xi) - found).abs() <= (other - v).abs() + 1e-12).all())
    assert torch.allclose(soft_threshold(soft_threshold(v, xi), 0.3), soft_threshold(v, xi + 0.3))


def test_the_references_operator_is_that_of_its_table() -> None:
    found = reference_threshold(vector(0.05, 0.1, 0.15, 0.25, -0.25, -0.15), 0.1)
    assert torch.allclose(found, vector(0.0, 0.1, 0.0, 0.15, -0.15, 0.0))
    assert found[2] == 0.0


@pytest.mark.parametrize("kind", [ProximalAdamW, ProximalSGD])
def test_a_threshold_of_zero_is_the_plain_optimizer_and_a_large_one_gives_exact_zeros(kind: type) -> None:
    a, b, c = parameters(), parameters(), parameters()
    run(kind(a, lr=0.01), a)
    run(kind([{"params": [b[0], b[2]]}, {"params": [b[1]], "threshold": 0.0}], lr=0.01), b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    run(kind([{"params": [c[0], c[2]]}, {"params": [c[1]], "threshold": 5.0}], lr=0.01), c)
    assert torch.equal(c[1].detach(), torch.zeros(4))
    assert bool((c[0] != 0).all())


def test_a_threshold_scaled_by_the_rate_matches_a_fixed_one() -> None:
    a, b = parameters(), parameters()
    run(ProximalAdamW([{"params": a, "threshold": 3e-4}], lr=0.01), a)
    run(ProximalAdamW([{"params": b, "threshold": 3e-2}], lr=0.01, scale_by_lr=True), b)
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(a, b, strict=True))


def test_a_riemannian_step_without_adam_is_the_same_for_every_balance_of_the_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, M = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 7), (5, 3), (3, 3)))
    products = []
    for S in (torch.eye(3, dtype=torch.float64), M):
        a, b = nn.Parameter(S @ A), nn.Parameter(B @ torch.linalg.inv(S))
        made = RiemannianAdamW(pairs=[(a, b)])
        (torch.sin(b @ a) ** 2).sum().backward()
        made.normalized = lambda grad, group, state: state.update(step=1) or grad  # type: ignore[method-assign,func-returns-value]
        made.param_groups[0]["betas"] = (0.0, 0.0)  # then the step size is lr
        made.step()
        products.append((b @ a).detach())
    assert torch.allclose(products[0], products[1], rtol=0, atol=1e-11)


def test_orthonormal_factors_make_the_riemannian_step_adams() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(7, 3, generator=generator)).Q
    P = torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q
    made = [[nn.Parameter(Q.T.clone()), nn.Parameter(P.clone())] for _ in range(2)]
    optimizers = [RiemannianAdamW(pairs=[(made[0][0], made[0][1])], lr=0.01), Adam(made[1], lr=0.01, eps=1e-8)]
    for (a, b), optimizer in zip(made, optimizers, strict=True):
        (torch.sin(b @ a) ** 2).sum().backward()
        optimizer.step()
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*made, strict=True))


def test_frozen_columns_stay_frozen_under_riemannian_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = nn.Parameter(torch.randn(3, 6, generator=generator)), nn.Parameter(torch.zeros(4, 3))
    before = a.detach().clone()
    made = RiemannianAdamW(pairs=[(a, b)], reg=1e-6)
    (b @ a).sin().sum().backward()
    assert a.grad is not None
    a.grad[:, :3] = 0
    made.step()
    assert torch.equal(a.detach()[:, :3], before[:, :3])


def test_updates_inside_the_backward_pass_are_those_of_one_optimizer_bit_for_bit() -> None:
    a, b = parameters(), parameters()
    run(torch.optim.SGD(a, lr=0.1), a)
    layers = PerLayer([{"params": b}], lambda groups: torch.optim.SGD(groups, lr=0.1))
    run(layers, b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(p.grad is None for p in b)


def test_per_layer_states_are_saved_and_loaded() -> None:
    def make(given: list[nn.Parameter]) -> PerLayer:
        return PerLayer([{"params": given, "rank": 2}], lambda groups: GaLore(groups, lr=0.01))

    a = parameters()
    first = make(a)
    run(first, a)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    second = make(b)
    second.load_state_dict(first.state_dict())
    run(first, a, 3)
    run(second, b, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    second.remove()
    loss_of(b, torch.Generator()).backward()
    assert b[0].grad is not None


@pytest.mark.parametrize("codes", list(Codes))
def test_codes_of_8_bits_are_the_nearest_levels(codes: Codes) -> None:
    table = levels(codes)
    assert len(table) == 256
    assert float(table[-1]) == 1.0
    assert 0.0 in table.tolist()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = values.abs() if codes is Codes.UNSIGNED else values
    found, scale = quantize(values, codes)
    back = dequantize(found, scale, values.shape, codes)
    scales = scale.repeat_interleave(256)[:1000]
    nearest = (values[:, None] / scales[:, None] - table).abs().amin(1) * scales
    assert torch.allclose((back - values).abs(), nearest, atol=1e-6)


def test_zeros_stay_zeros_in_8_bits() -> None:
    found, scale = quantize(torch.zeros(300), Codes.SIGNED)
    assert torch.equal(dequantize(found, scale, torch.Size([300]), Codes.SIGNED), torch.zeros(300))


def test_every_optimizer_of_the_spec_is_made_and_trains() -> None:
    assert {"fira", "galore", "proximal_adamw", "riemannian_adamw"} <= set(OPTIMIZERS.names())
    for rule in OPTIMIZERS:
        given = parameters()
        before = [p.detach().clone() for p in given]
        named = {"up": given[0], "bias": given[1], "down": given[2]}
        run(rule(Trained(named, frozenset({"bias"}), ()), rule.options()), given, 2)
        assert not torch.equal(given[0].detach(), before[0]), rule.name


def test_gates_have_the_threshold_and_do_not_decay() -> None:
    rule = OPTIMIZERS.get("proximal_adamw")
    given = parameters()
    named = {"up": given[0], "gate": given[1], "down": given[2]}
    made = rule(Trained(named, frozenset({"gate"})), rule.options(weight_decay=0.1, threshold=0.5))
    gates = next(group for group in made.param_groups if group["params"][0] is given[1])
    others = next(group for group in made.param_groups if group["params"][0] is given[0])
    assert (gates["threshold"], gates["weight_decay"]) == (0.5, 0.0)
    assert (others["threshold"], others["weight_decay"]) == (0.0, 0.1)
