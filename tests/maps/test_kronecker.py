"""Sums of Kronecker products: the invariants of PHM layers."""

import pytest
import torch
from random_maps import F64, randn

from lrc.maps import Dense, Kronecker, Sum, restore, simplify


def phm(n: int, in_features: int, out_features: int, rank: int = 1, bias: bool = False) -> Kronecker:
    left, right = randn(n, in_features // n, rank, seed=1), randn(n, rank, out_features // n, seed=2)
    return Kronecker(randn(n, n, n, seed=0), left, right, randn(out_features, seed=3) if bias else None)


@pytest.mark.parametrize(("n", "shape", "rank"), [(4, (12, 8), 1), (2, (6, 10), 2), (1, (5, 1), 3), (3, (3, 9), 1)])
def test_the_weight_is_the_sum_of_kronecker_products_transposed(n: int, shape: tuple[int, int], rank: int) -> None:
    made = phm(n, *shape, rank, bias=True)
    H = sum(torch.kron(made.C[i], made.S[i] @ made.T[i]) for i in range(n))
    assert isinstance(H, torch.Tensor)
    assert H.shape == shape
    assert torch.allclose(made.exact().weight, H.T, rtol=0, atol=1e-13)
    x = randn(2, 3, shape[0], seed=5)
    assert torch.allclose(made(x), x @ H + made.bias, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(H) <= min(*shape, n * n * rank)


def test_one_summand_with_the_rule_one_is_a_dense_layer() -> None:
    W = randn(5, 7, seed=0)
    made = Kronecker(torch.ones(1, 1, 1, dtype=F64), W.T[None], torch.eye(5, dtype=F64)[None])
    assert torch.equal(made.exact().weight, W)


def test_quaternions_and_complex_numbers_are_rules() -> None:
    a, b = randn(4, seed=0), randn(4, seed=1)
    hamilton = torch.zeros(4, 4, 4, dtype=F64)  # hamilton[i] is left multiplication by the unit i, on columns
    for i, rows in enumerate(
        [[(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 3, 1)], [(0, 1, -1), (1, 0, 1), (2, 3, -1), (3, 2, 1)],
         [(0, 2, -1), (1, 3, 1), (2, 0, 1), (3, 1, -1)], [(0, 3, -1), (1, 2, -1), (2, 1, 1), (3, 0, 1)]]
    ):  # fmt: skip
        for row, column, sign in rows:
            hamilton[i, row, column] = sign
    made = Kronecker(hamilton.transpose(1, 2), a[:, None, None], torch.ones(4, 1, 1, dtype=F64))
    product = torch.stack([
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3], a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1], a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    ])  # fmt: skip
    assert torch.allclose(made(b), product, rtol=0, atol=1e-14)
    z, w = torch.tensor([1.5, -2.0], dtype=F64), torch.tensor([0.5, 3.0], dtype=F64)
    turn = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]], dtype=F64)
    complex_ = Kronecker(turn.transpose(1, 2), z[:, None, None], torch.ones(2, 1, 1, dtype=F64))
    assert torch.allclose(torch.view_as_complex(complex_(w)), torch.view_as_complex(z) * torch.view_as_complex(w))


def test_a_rule_times_c_and_left_factors_over_c_are_the_same_weight() -> None:
    made = phm(4, 8, 12)
    other = Kronecker(made.C.detach() * 4, made.S.detach() / 4, made.T)
    assert torch.equal(other.exact().weight, made.exact().weight)


def test_a_shared_rule_is_one_parameter_and_gathers_the_gradients_of_all() -> None:
    down = phm(2, 8, 4)
    up = Kronecker(down.C, randn(2, 2, 1, seed=5), randn(2, 1, 4, seed=6))
    assert up.C is down.C
    x = randn(3, 8, seed=7)
    up(down(x)).sum().backward()
    together = down.C.grad.clone()
    apart = Kronecker(down.C.detach().clone(), down.S, down.T)
    both = Kronecker(down.C.detach().clone(), up.S, up.T)
    both(apart(x)).sum().backward()
    assert torch.allclose(together, apart.C.grad + both.C.grad)


def test_costs_structure_text_and_merging() -> None:
    made = phm(4, 16, 8, rank=2, bias=True)
    numbers = 2 * 24 + 64
    assert made.cost(3).parameters == numbers + 8 == sum(p.numel() for p in made.parameters())
    assert made.cost(3).flops == 3 * (2 * 2 * (4 * 24 + 64) + 8)
    assert repr(made) == "Kronecker[8,16; 4]"
    restored = restore(made.structure()).double()
    restored.load_state_dict(made.state_dict())
    x = randn(2, 16, seed=5)
    assert torch.equal(restored(x), made(x))
    merged = simplify(Sum(randn(8, 16, seed=6), made)).map
    assert isinstance(merged, Dense)
    assert torch.allclose(merged(x), x @ randn(8, 16, seed=6).T + made(x), rtol=0, atol=1e-12)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Kronecker(torch.zeros(2, 2, 2), torch.zeros(2, 3, 1), torch.zeros(2, 2, 3))
