"""One Kronecker product for a sum of several."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrc.solvers.kronecker import joined

F64 = torch.float64


def terms(seed: int, count: int, rows: int, columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        X = torch.randn(columns, columns, generator=generator, dtype=F64)
        made.append((torch.rand(rows, generator=generator, dtype=F64), X @ X.T))
    return made


@given(seed=st.integers(0, 2**32), count=st.integers(1, 3), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_both_partial_traces_are_those_of_the_sum(seed: int, count: int, rows: int, columns: int) -> None:
    given = terms(seed, count, rows, columns)
    d, M = joined(given)
    whole = sum(torch.kron(torch.diag(d_i), M_i) for d_i, M_i in given).reshape(rows, columns, rows, columns)  # type: ignore[union-attr]
    bound = 1e-12 * float(whole.abs().sum())
    assert float((d * M.trace() - torch.einsum("icic->i", whole)).abs().max()) <= bound
    assert float((d.sum() * M - torch.einsum("icid->cd", whole)).abs().max()) <= bound


def test_a_sum_that_is_a_product_is_found() -> None:
    ((d, M),) = terms(0, 1, 4, 3)
    for some in ([(d, M)], [(d, M), (2 * d, M)], [(d, M), (d, 3 * M)]):
        found = torch.kron(torch.diag(joined(some)[0]), joined(some)[1])
        expected = sum(torch.kron(torch.diag(d_i), M_i) for d_i, M_i in some)
        assert torch.allclose(found, expected)  # type: ignore[arg-type]


def test_nothing_to_weigh_with_is_zero() -> None:
    d, M = joined([(torch.zeros(4), torch.eye(3)), (torch.zeros(4), torch.zeros(3, 3))])
    assert not d.any()
    assert not M.any()
