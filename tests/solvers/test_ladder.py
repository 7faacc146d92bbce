"""The root of a second moment: exact where it can be, floored where it must be, never a failure, and always told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EPS, F64, INPUTS, moments_of, orthogonal, randn, samples, seeds
from torch import Tensor

from lrc.solvers import root
from lrc.solvers.ladder import FLOOR, Root

sizes = st.sampled_from([1, 2, 5, 8])
kinds = st.sampled_from(INPUTS)
variants = st.sampled_from(["cholesky", "eigh"])


def moment(size: int, seed: int, kind: str = "full") -> Tensor:
    gram = moments_of(samples(size, seed, kind)).gram
    assert gram is not None
    return gram


@settings(max_examples=30, deadline=None)
@given(size=sizes, seed=seeds, variant=variants, share=st.sampled_from([0.0, 1e-6, 1.0]))
def test_a_positive_moment_has_an_exact_root_without_a_note(size: int, seed: int, variant: str, share: float) -> None:
    C = moment(size, seed)
    found = root(C, "gram", share, variant)
    damped = C + share * C.diagonal().mean() * torch.eye(size, dtype=F64)
    assert found.weight == 1.0
    assert found.notes == ()
    assert float((found.matrix @ found.matrix.T - damped).norm()) <= 16 * size * EPS * float(damped.norm())
    if variant == "cholesky":
        assert found.inverse is None
        assert torch.equal(found.matrix, found.matrix.tril())


@settings(max_examples=30, deadline=None)
@given(size=sizes, seed=seeds, kind=kinds, variant=variants, share=st.sampled_from([0.0, 1e-6, 1.0]))
def test_the_ladder_never_fails_and_its_three_operations_agree(
    size: int, seed: int, kind: str, variant: str, share: float
) -> None:
    found = root(moment(size, seed, kind), "gram", share, variant)
    X = randn(3, size, seed=seed)
    assert torch.isfinite(found.matrix).all()
    condition = float(torch.linalg.cond(found.matrix))
    tolerance = 64 * size * EPS * condition * float(X.norm())
    assert condition <= 1.01 * FLOOR**-0.5 * size**0.5 or (variant, share) == ("cholesky", 0.0)
    assert float((found.solve(found.apply(X)) - X).norm()) <= tolerance
    assert float((found.apply(found.solve(X)) - X).norm()) <= tolerance
    divided = found.divide(X)
    assert float((divided @ found.matrix @ found.matrix.T - X).norm()) <= tolerance * condition


@pytest.mark.parametrize("variant", ["cholesky", "eigh"])
@pytest.mark.parametrize(("kind", "kept"), [("few", 4), ("dead", 4)])
def test_a_singular_moment_is_floored_and_told_with_its_rank(kind: str, kept: int, variant: str) -> None:
    C = moment(8, 1, kind)
    found = root(C, "gram", 0.0, variant)  # type: ignore[arg-type]
    assert found.notes == (f"gram is singular (rank {kept} of 8): eigh with floor 1e-10",)
    assert found.weight == 1.0
    largest = float(torch.linalg.eigvalsh(C)[-1])
    added = found.matrix @ found.matrix.T - C
    assert float(torch.linalg.matrix_norm(added, 2)) <= FLOOR * largest * (1 + 1e-3)
    assert float(torch.linalg.eigvalsh(added)[0]) >= -16 * 8 * EPS * largest


@pytest.mark.parametrize("kind", ["few", "dead"])
def test_damping_makes_a_singular_moment_regular(kind: str) -> None:
    C = moment(8, 1, kind)
    found = root(C, "gram", 1e-6)
    assert found.notes == ()
    damped = C + 1e-6 * C.diagonal().mean() * torch.eye(8, dtype=F64)
    assert float((found.matrix @ found.matrix.T - damped).norm()) <= 16 * 8 * EPS * float(C.norm())


@pytest.mark.parametrize("variant", ["cholesky", "eigh"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_zero_moment_becomes_the_identity_of_no_weight_and_is_told(variant: str, share: float) -> None:
    found = root(torch.zeros(3, 3, dtype=F64), "fisher", share, variant)  # type: ignore[arg-type]
    assert found.weight == 0.0
    assert found.notes == ("fisher is zero: calibration does not reach this layer, and its errors are not weighed",)
    X = randn(2, 3, seed=0)
    assert torch.equal(found.apply(X), X)
    assert torch.equal(found.solve(X), X)
    assert torch.equal(found.divide(X), X)


def test_an_indefinite_moment_that_rounding_made_is_floored() -> None:
    Q = orthogonal(5, 0)
    C = Q * torch.tensor([1.0, 0.5, 1e-18, -1e-17, -1e-14], dtype=F64) @ Q.T
    found = root(C, "gram")
    assert found.notes == ("gram is singular (rank 2 of 5): eigh with floor 1e-10",)
    assert float(torch.linalg.matrix_norm(found.matrix @ found.matrix.T - C, 2)) <= FLOOR * (1 + 1e-3)


def test_eigenvalues_that_do_not_converge_leave_the_identity_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = root(4 * torch.eye(3, dtype=F64), "gram", variant="eigh")
    assert found.notes == ("gram has no eigenvalues that converge: the identity takes its place",)
    assert found.weight == 1.0
    assert torch.equal(found.matrix, 2 * torch.eye(3, dtype=F64))
    assert torch.equal(found.solve(found.apply(torch.eye(3, dtype=F64))), torch.eye(3, dtype=F64))


@pytest.mark.parametrize("variant", ["cholesky", "eigh"])
@pytest.mark.parametrize("exponent", [-280, -100, 100, 280])
def test_units_change_nothing_but_the_scale(exponent: int, variant: str) -> None:
    C = moment(5, 1)
    unit = 4.0 ** (exponent / 2) if abs(exponent) < 200 else 10.0**exponent
    plain, scaled = root(C, "gram", 1e-6, variant), root(unit * C, "gram", 1e-6, variant)  # type: ignore[arg-type]
    assert scaled.weight == 1.0
    assert torch.allclose(scaled.matrix / unit**0.5, plain.matrix, rtol=1e-10, atol=1e-10)
    X = randn(2, 5, seed=3)
    assert torch.allclose(scaled.solve(X) * unit**0.5, plain.solve(X), rtol=1e-9, atol=1e-9)


def test_the_symmetric_part_is_taken_and_the_input_left_alone() -> None:
    C = moment(4, 1)
    skew = randn(4, 4, seed=2)
    given = C + skew - skew.T
    before = given.clone()
    found = root(given, "gram", 1.0)
    expected = root(C, "gram", 1.0)
    assert torch.equal(given, before)
    assert torch.allclose(found.matrix, expected.matrix, rtol=0, atol=64 * EPS * float(given.norm()))


def test_a_float32_moment_is_computed_with_in_float64() -> None:
    C = moment(4, 1).float()
    assert root(C, "gram").matrix.dtype == F64
    assert torch.equal(root(C, "gram").matrix, root(C.double(), "gram").matrix)


def test_a_root_without_an_inverse_solves_with_its_triangle() -> None:
    L = torch.tensor([[2.0, 0.0], [1.0, 4.0]], dtype=F64)
    made = Root(L)
    assert torch.equal(made.solve(torch.tensor([[2.0, 4.0]], dtype=F64)), torch.tensor([[0.5, 1.0]], dtype=F64))
