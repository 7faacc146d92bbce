"""Slicing on numbers: orthogonal directions, and weights that read and write in them as they did before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EPS, orthogonal, randn, seeds

from lrc.solvers.rotation import directions, rotated_reader, rotated_writer

sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(size=sizes, tokens=st.integers(0, 20), seed=seeds)
def test_directions_are_orthogonal_and_the_strongest_come_first(size: int, tokens: int, seed: int) -> None:
    X = randn(tokens, size, seed=seed)
    C = X.T @ X
    Q, shares = directions(C)
    assert float((Q.T @ Q - torch.eye(size, dtype=Q.dtype)).abs().max()) <= 64 * size * EPS
    assert bool((shares.diff() <= 0).all())
    energies = (Q.T @ C @ Q).diagonal()
    total = float(C.trace())
    assert float((energies - total * shares).abs().max()) <= 64 * size * EPS * max(total, 1.0)
    assert float(shares.sum()) == pytest.approx(1 if tokens else 0)


@settings(max_examples=40, deadline=None)
@given(size=sizes, kept=sizes, seed=seeds)
def test_no_other_directions_keep_more_of_the_stream(size: int, kept: int, seed: int) -> None:
    X, kept = randn(20, size, seed=seed), min(kept, size)
    best = directions(X.T @ X)[0][:, :kept]
    other = orthogonal(size, seed + 1)[:, :kept]
    assert float((X @ best).norm()) >= float((X @ other).norm()) * (1 - 64 * size * EPS)


@settings(max_examples=40, deadline=None)
@given(size=sizes, inner=sizes, seed=seeds, bias=st.booleans(), centers=st.booleans())
def test_what_is_written_in_all_directions_is_what_was_written(
    size: int, inner: int, seed: int, bias: bool, centers: bool
) -> None:
    W, x, Q = randn(size, inner, seed=seed), randn(5, inner, seed=seed + 1), orthogonal(size, seed + 2)
    b = randn(size, seed=seed + 3) if bias else None
    y = x @ W.T + (0 if b is None else b)
    if centers:
        y = y - y.mean(1, keepdim=True)
    made, moved = rotated_writer(W, b, Q, centers=centers)
    written = x @ made.T + (0 if moved is None else moved)
    assert float((written @ Q.T - y).abs().max()) <= 256 * (size + inner) * EPS * (1 + float(y.abs().max()))


@settings(max_examples=40, deadline=None)
@given(size=sizes, outer=sizes, seed=seeds, bias=st.booleans(), norm=st.sampled_from(["plain", "gain", "gain and shift"]))
def test_what_is_read_in_all_directions_is_what_was_read_behind_the_norm(
    size: int, outer: int, seed: int, bias: bool, norm: str
) -> None:
    W, x, Q = randn(outer, size, seed=seed), randn(5, size, seed=seed + 1), orthogonal(size, seed + 2)
    b = randn(outer, seed=seed + 3) if bias else None
    gain = None if norm == "plain" else randn(size, seed=seed + 4)
    shift = randn(size, seed=seed + 5) if norm == "gain and shift" else None
    y = (x * (1 if gain is None else gain) + (0 if shift is None else shift)) @ W.T + (0 if b is None else b)
    made, moved = rotated_reader(W, b, gain, shift, Q)
    read = x @ Q @ made.T + (0 if moved is None else moved)
    assert float((read - y).abs().max()) <= 256 * (size + outer) * EPS * (1 + float(y.abs().max()))
    assert (moved is None) == (b is None and shift is None)
