"""Error feedback: never worse than plain rounding where inputs are correlated, equal to it where they are not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc.formats import FORMATS, NormalFloat, NumberFormat
from lrc.solvers.feedback import Feedback, fitted_scales, inverse_root


def correlated(columns: int, seed: int = 0) -> Tensor:
    """A second moment whose eigenvalues span four decades."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator)).Q
    return Q * torch.logspace(0, -4, columns, dtype=torch.float64) @ Q.T


def randn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    error = weight - found.double()
    return float((error @ gram * error).sum())


def by_columns(weight: Tensor, gram: Tensor, form: NumberFormat) -> Tensor:
    """The same by its definition: after every column the others become the best that they can be, by least squares."""
    shape = (weight.shape[0], weight.shape[1])
    scales = form.spread_scales(form.store_scales(fitted_scales(weight, form, gram.diagonal()), shape), shape).double()
    left, done, rest = weight.clone(), [], gram.diagonal().argsort(descending=True, stable=True).tolist()
    while rest:
        j = rest.pop(0)
        done.append(j)
        left[:, j] = form.levels.double()[form.nearest(left[:, j], scales[:, j])] * scales[:, j]
        if rest:
            error = weight[:, done] - left[:, done]
            left[:, rest] = weight[:, rest] + torch.linalg.solve(gram[rest][:, rest], gram[rest][:, done] @ error.T).T
    return left


@pytest.mark.parametrize("name", ["nf2", "nf4", "int4"])
@pytest.mark.parametrize("shape", [(12, 70), (70, 12), (1, 9), (5, 1)])
def test_each_column_makes_up_for_those_before_it(name: str, shape: tuple[int, int]) -> None:
    W, C, form = randn(*shape), correlated(shape[1]), FORMATS[name]
    found = form.decode(Feedback(C).encode(W, form), shape).double()
    torch.testing.assert_close(found, by_columns(W, C, form), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", list(FORMATS))
def test_correlated_inputs_are_served_better_than_by_the_nearest_numbers(name: str) -> None:
    W, C, form = randn(48, 96), correlated(96), FORMATS[name]
    found = form.decode(Feedback(C).encode(W, form), (48, 96))
    assert loss(W, found, C) < 0.7 * loss(W, form.rounded(W), C)


@pytest.mark.parametrize("name", list(FORMATS))
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(name: str) -> None:
    W, form = randn(16, 64).float().double(), FORMATS[name]
    C = torch.eye(64, dtype=torch.float64)
    stored = form.store_scales(fitted_scales(W, form, C.diagonal()), (16, 64))
    plain = form.with_codes(stored, form.nearest(W.float(), form.spread_scales(stored, (16, 64))))
    torch.testing.assert_close(form.decode(Feedback(C).encode(W, form), (16, 64)), form.decode(plain, (16, 64)))


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
def test_fitted_scales_lose_no_more_than_the_largest_magnitude(bits: int, seed: int) -> None:
    form = NormalFloat(bits=bits, block=16, scale_bits=None)
    W, worth = randn(6, 32, seed).float(), randn(6, 32, seed + 1).square().float() + 0.01
    shape = (6, 32)
    stored = form.store_scales(fitted_scales(W, form, worth), shape)
    found = form.decode(form.with_codes(stored, form.nearest(W, form.spread_scales(stored, shape))), shape)
    plain = form.decode(form.encode(W), shape)
    assert float((worth * (W - found).square()).sum()) <= float((worth * (W - plain).square()).sum()) * (1 + 1e-5)


def test_a_block_of_zeros_stays_zero() -> None:
    W = torch.cat([torch.zeros(2, 64, dtype=torch.float64), randn(2, 64)])
    found = FORMATS["nf3"].decode(Feedback(correlated(64)).encode(W, FORMATS["nf3"]), (4, 64))
    assert bool((found[:2] == 0).all())
    assert bool(torch.isfinite(found).all())


def test_the_root_of_the_inverse_is_upper_triangular() -> None:
    C = correlated(20)
    U = inverse_root(C)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ C, torch.eye(20, dtype=torch.float64), atol=1e-9, rtol=0)
