"""Singular values, computed once in float64."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrc.measure import Cache, spectrum, stable_rank

EPS = torch.finfo(torch.float64).eps


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_a_spectrum_holds_the_norms_of_the_matrix(rows: int, columns: int, seed: int) -> None:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    S = spectrum(W)
    tolerance = 8 * max(rows, columns) * EPS * float(torch.linalg.matrix_norm(W, 2))
    assert S.shape == (min(rows, columns),)
    assert bool((S.diff() <= 0).all())
    assert abs(float(S[0] - torch.linalg.matrix_norm(W, 2))) <= tolerance
    assert abs(float(S.norm() - torch.linalg.matrix_norm(W))) <= 2 * tolerance
    assert abs(float(S.sum() - torch.linalg.matrix_norm(W, "nuc"))) <= min(rows, columns) * tolerance
    assert torch.allclose(spectrum(W.T), S, rtol=0, atol=tolerance)


def test_a_spectrum_is_computed_in_float64_whatever_the_weight() -> None:
    W = torch.diag(torch.tensor([1.0, 1e-3, 1e-7])).to(torch.float32)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].float()
    mixed = Q @ W
    S = spectrum(torch.nn.Parameter(mixed))
    assert S.dtype == torch.float64
    assert not S.requires_grad
    assert torch.allclose(S, torch.linalg.svdvals(mixed.double()), rtol=0, atol=8 * 3 * EPS)
    assert spectrum(mixed.bfloat16()).dtype == torch.float64


def test_zero_and_deficient_weights_have_zeros() -> None:
    assert torch.equal(spectrum(torch.zeros(3, 5)), torch.zeros(3, dtype=torch.float64))
    u, v = torch.arange(1.0, 5), torch.arange(1.0, 4)
    S = spectrum(torch.outer(u, v))
    assert float(S[0]) == pytest.approx(float(u.norm() * v.norm()), rel=1e-6)
    assert float(S[1]) <= 8 * 4 * EPS * float(S[0])


def test_a_spectrum_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, W = Cache(tmp_path), torch.randn(5, 4)
    S = spectrum(W, cache)

    def never(_: Tensor) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(torch.linalg, "svdvals", never)
    assert torch.equal(spectrum(W, cache), S)
    assert torch.equal(spectrum(W.clone(), Cache(tmp_path)), S)
    with pytest.raises(AssertionError, match="computed again"):
        spectrum(W + 1, cache)
    with pytest.raises(AssertionError, match="computed again"):
        spectrum(W.double(), cache)
    assert cache.size()[0] == 1


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_the_stable_rank_lies_between_one_and_the_number_of_values(values: list[float]) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    found = stable_rank(S)
    assert 1 - 8 * EPS <= found <= len(values) * (1 + 8 * EPS)
    assert stable_rank(3 * S) == pytest.approx(found, rel=1e-12)


def test_the_stable_rank_of_known_spectra() -> None:
    assert stable_rank(torch.ones(5).double()) == 5
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0]).double()) == 1.5
    assert stable_rank(torch.tensor([3.0]).double()) == 1
    assert stable_rank(torch.zeros(4).double()) == 0
    assert stable_rank(torch.zeros(0)) == 0
