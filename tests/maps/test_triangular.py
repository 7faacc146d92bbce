"""Triangular factors store what a triangle has, and nothing else."""

import pytest
import torch
from random_maps import F64, randn

from lrc.maps import Triangular, restore

SHAPES = [(1, 1), (2, 2), (3, 3), (6, 6), (7, 3), (8, 4), (5, 1), (9, 5)]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_the_triangle_of_a_matrix_comes_back_and_takes_only_its_numbers(rows: int, size: int, upper: bool, unit: bool) -> None:
    matrix = randn(size, rows, seed=3) if upper else randn(rows, size, seed=3)
    made = Triangular.of(matrix, upper=upper, unit=unit)
    expected = matrix.triu() if upper else matrix.tril()
    if unit:
        expected = expected.clone()
        expected.diagonal().fill_(1)
    assert torch.equal(made.exact().weight, expected)
    assert torch.equal(made.matrix(), expected)
    numbers = rows * size - size * (size - 1) // 2 - (size if unit else 0)
    assert made.cost().parameters == sum(p.numel() for p in made.parameters()) == numbers
    assert made.cost().bytes == 8 * numbers
    restored = restore(made.structure()).double()
    restored.load_state_dict(made.state_dict())
    x = randn(2, 3, made.in_features, seed=4)
    assert torch.equal(restored(x), made(x))
    assert torch.allclose(made(x), x @ expected.T, rtol=0, atol=1e-13)


def test_gradients_reach_the_packed_numbers() -> None:
    made, x = Triangular.of(randn(6, 4, seed=0)), randn(3, 4, seed=1)
    made(x).sum().backward()
    full = (torch.ones(3, 6, dtype=F64).T @ x).tril(-1)
    assert torch.allclose(Triangular.of(full).packed, made.packed.grad)
    assert torch.allclose(full[4:], made.rest.grad)


def test_a_lower_factor_with_more_columns_than_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a lower triangular factor cannot have the shape \(2, 3\)"):
        Triangular.of(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a triangle of 4 packs into"):
        Triangular(torch.zeros(2, 2), torch.zeros(1, 4))


def test_it_reads_as_one_line() -> None:
    assert repr(Triangular.of(torch.zeros(5, 3))) == "Triangular[5,3; unit lower]"
    assert repr(Triangular.of(torch.zeros(3, 5), upper=True, unit=False)) == "Triangular[3,5; upper]"
