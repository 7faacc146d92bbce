"""The small maps of adapters: gates, blocks, dropout, masks, and a branch that is no linear map."""

import pytest
import torch
from random_maps import F64, assert_equal_maps, randn

from lrc.maps import (
    Blocks,
    Bottleneck,
    Chain,
    Conv,
    Dense,
    Dropout,
    Gate,
    Geometry,
    Identity,
    Kronecker,
    LinearMap,
    Lookup,
    OutputMask,
    Scalar,
    Scale,
    Sum,
    Triangular,
    Tucker,
    fold,
    frozen,
    restore,
    simplify,
)


def shrunk(values: torch.Tensor, threshold: float) -> torch.Tensor:
    gate = Gate(values.clone())
    gate.shrink(threshold)
    return gate.diagonal.detach()


def test_the_proximal_step_is_the_minimiser_and_leaves_exact_zeros() -> None:
    v, grid = torch.linspace(-2, 2, 41, dtype=F64), torch.linspace(-3, 3, 6001, dtype=F64)
    best = grid[(0.5 * (grid - v[:, None]) ** 2 + 0.3 * grid.abs()).argmin(1)]
    made = shrunk(v, 0.3)
    assert (made - best).abs().max() <= 6 / 6000
    assert torch.equal(made == 0, v.abs() <= 0.3)
    assert (made[1:] - made[:-1]).max() <= (v[1:] - v[:-1]).max() + 1e-12
    assert torch.allclose(shrunk(made, 0.2), shrunk(v, 0.5), rtol=0, atol=1e-12)


def test_a_gate_stays_in_float32_and_works_in_the_dtype_of_its_input() -> None:
    gate = Gate(torch.ones(3, dtype=torch.bfloat16))
    assert gate.diagonal.dtype == torch.float32
    assert gate(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def gated(g: torch.Tensor, kind: str) -> tuple[Chain, torch.Tensor]:
    r = len(g)
    if kind == "conv":
        B = Conv(randn(6, r, 1, 1, seed=0), Geometry.unit(2))
        A = Conv(randn(r, 4, 3, 3, seed=1), Geometry((2, 1), (1, 1), (1, 2)))
        return Chain(B, Gate(g, spatial=2), A), randn(2, 4, 7, 8, seed=3)
    if kind == "embedding":
        return Chain(randn(6, r, seed=0), Gate(g), Lookup(randn(9, r, seed=1))), torch.tensor([[0, 8], [3, 3]])
    return Chain(randn(6, r, seed=0), Gate(g), randn(r, 4, seed=1)), randn(2, 4, seed=3)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_closed_gates_take_their_components_away(kind: str) -> None:
    made, x = gated(torch.tensor([0.5, 0.0, -2.0, 0.0], dtype=F64), kind)
    smaller, notes = simplify(made)
    assert any(note.startswith("drop closed gates: ") for note in notes)
    assert torch.allclose(smaller(x), made(x), rtol=0, atol=1e-12)
    numbers = sum(p.numel() for p in smaller.parameters())
    assert numbers == 2 * {"linear": 10, "conv": 6 + 36, "embedding": 15}[kind]


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_a_branch_whose_gates_are_all_closed_goes(kind: str) -> None:
    branch, x = gated(torch.zeros(3, dtype=F64), kind)
    bases = {"linear": Dense, "embedding": Lookup}
    W = randn(6, 4, seed=7) if kind == "linear" else randn(9, 6, seed=7)
    base = Conv(randn(6, 4, 3, 3, seed=7), branch.A.geometry) if kind == "conv" else bases[kind](W)
    smaller, _ = simplify(Sum(base, Scale(branch, 2.0)))
    assert type(smaller) is type(base)
    assert torch.equal(smaller(x), base(x))


def test_a_branch_of_rank_zero_is_left_out_beside_a_factorised_weight() -> None:
    base, (branch, x) = Chain(randn(6, 1, seed=5), randn(1, 4, seed=6)), gated(torch.zeros(3, dtype=F64), "linear")
    smaller, notes = simplify(Sum(base, Scale(branch, 2.0)))
    assert repr(smaller) == "Chain[6,1,4]"
    assert any(note.startswith("drop empty terms: ") for note in notes)
    assert torch.equal(smaller(x), base(x))


def test_blocks_train_only_what_is_not_frozen() -> None:
    made = Blocks(frozen(Dense(randn(2, 2, seed=0))).weight, randn(3, 2, seed=1), "out")
    made(randn(6, 2, seed=2)).sum().backward()
    assert made.first.grad is None
    assert made.second.grad is not None
    assert repr(made) == "Blocks[2*+3,2]"
    assert repr(Blocks(randn(2, 1, seed=0), randn(2, 4, seed=1), "in")) == "Blocks[2,1+4]"
    chain = Chain(made, Blocks(randn(2, 2, seed=3), randn(2, 5, seed=4), "in"))
    smaller, _ = simplify(chain)
    assert repr(smaller) == "Chain[5,2,7]"
    assert_equal_maps(chain, smaller)
    with pytest.raises(ValueError, match="blocks lie along `out` or `in`, not 'up'"):
        Blocks(torch.zeros(1, 1), torch.zeros(1, 1), "up")  # type: ignore[arg-type]


def test_dropout_acts_in_training_alone_and_is_dropped_by_folding() -> None:
    torch.manual_seed(0)
    made = Chain(randn(3, 2, seed=0), randn(2, 50, seed=1), Dropout(50, 0.5, F64))
    x = randn(4, 50, seed=2)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    assert repr(made) == "Chain(Dense[3,2], Dense[2,50], Dropout(0.5))"
    smaller, _ = simplify(made)
    assert repr(smaller) == "Chain[3,2,50]"
    assert torch.equal(smaller(x), made(x))
    assert restore(made.structure()).structure() == made.structure()


def test_a_mask_keeps_an_adapter_from_outputs_of_a_fused_weight() -> None:
    mask = torch.tensor([True, True, False, False, True])
    made = Sum(randn(5, 4, seed=0), Chain(OutputMask(mask, F64), randn(5, 2, seed=1), randn(2, 4, seed=2)))
    x = randn(3, 4, seed=3)
    assert torch.equal((made(x) - x @ randn(5, 4, seed=0).T)[:, ~mask], torch.zeros(3, 2, dtype=F64))
    merged, _ = simplify(made)
    assert repr(merged) == "Dense[5,4]"
    assert_equal_maps(made, merged)


def test_a_sequential_branch_multiplies_out_over_rows_images_and_tables() -> None:
    W, b = randn(6, 4, seed=0), randn(6, seed=1)
    C, D = randn(2, 6, seed=2), randn(6, 2, seed=3)
    after = Sum(Identity(6, F64), Scale(Chain(D, C), 0.5))
    dense, _ = simplify(Chain(after, Dense(W, b)))
    assert repr(dense) == "Dense[6,4]"
    assert torch.allclose(dense.exact().weight, W + 0.5 * D @ C @ W, rtol=0, atol=1e-13)
    assert torch.allclose(dense.exact().bias, b + 0.5 * D @ C @ b, rtol=0, atol=1e-13)
    table, _ = simplify(Chain(after, Lookup(randn(9, 6, seed=4))))
    assert repr(table) == "Lookup[9,6]"
    point = [Conv(part[..., None, None], Geometry.unit(2)) for part in (D, C)]
    conv = Conv(randn(6, 4, 3, 3, seed=5), Geometry((2, 2), (1, 1), (1, 1)), b)
    made = Chain(Sum(Identity(6, F64), Scale(Chain(*point), 0.5)), conv, bias=randn(6, seed=6))
    x = randn(2, 4, 7, 7, seed=7)
    merged, _ = simplify(made)
    assert repr(merged) == "Conv[6,4,3x3]"
    assert torch.allclose(merged(x), made(x), rtol=0, atol=1e-12)
    h = conv(x)
    expected = h + 0.5 * torch.einsum("oc,bchw->bohw", D @ C, h) + randn(6, seed=6)[:, None, None]
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-12)


def test_a_branch_with_an_activation_stands_for_no_weight_and_says_why() -> None:
    branch = Bottleneck(Dense(randn(6, 2, seed=0), randn(6, seed=1)), Dense(randn(2, 6, seed=2), randn(2, seed=3)), "relu")
    made = Chain(branch, Dense(randn(6, 4, seed=4), randn(6, seed=5)))
    x = randn(3, 4, seed=6)
    h = made.slots[1](x)
    expected = h + torch.relu(h @ branch.down.weight.T + branch.down.bias) @ branch.up.weight.T + branch.up.bias
    assert torch.allclose(made(x), expected, rtol=0, atol=1e-13)
    reason = "the activation `relu` stands between the two projections"
    assert str(made.obstacle()).startswith(reason)
    assert made.slots[1].obstacle() is None
    for call in (made.dense, made.exact, lambda: fold(made)):
        with pytest.raises(TypeError, match=reason):
            call()
    assert simplify(made) == (made, ())
    assert made.weight.shape == (6, 4)
    assert made.weight.is_meta
    assert repr(made) == "Chain(Bottleneck[6,2,6; Dense, relu], Dense[6,4])"
    assert made.cost(5).parameters == sum(p.numel() for p in made.parameters())
    assert branch.cost(5).flops == 5 * (2 * 2 * 12 + 6 + 2 + 2 + 6)
    restored = restore(made.structure()).double()
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored(x), made(x))
    assert torch.equal(made.with_bias(torch.nn.Parameter(randn(6, seed=8)))(x), made(x) + randn(6, seed=8))
    with pytest.raises(ValueError, match=r"unknown activation 'bent'; known: gelu_new"):
        Bottleneck(torch.zeros(3, 1), torch.zeros(1, 3), "bent")
    with pytest.raises(ValueError, match="goes down and up again"):
        Bottleneck(torch.zeros(3, 1), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "made",
    [
        gated(torch.ones(2, dtype=F64), "linear")[0].slots[1],
        Identity(4, F64),
        OutputMask(torch.tensor([True, False]), F64),
        Scalar(randn(1, seed=0), 3),
        Triangular.of(randn(5, 3, seed=0)),
        Blocks(randn(2, 3, seed=0), randn(2, 3, seed=1), "out"),
        Kronecker(randn(2, 2, 2, seed=0), randn(2, 3, 1, seed=1), randn(2, 1, 2, seed=2)),
        Tucker(randn(2, 2, 1, seed=0), [randn(4, 2, seed=1), randn(3, 2, seed=2), randn(3, 1, seed=3)], Geometry.unit(1)),
    ],
    ids=repr,
)
def test_the_matrix_with_a_gradient_is_the_dense_weight(made: LinearMap) -> None:
    matrix = made.matrix()
    assert torch.allclose(matrix.detach(), made.exact().weight, rtol=0, atol=1e-13)
    assert matrix.requires_grad == any(p.requires_grad for p in made.parameters())
