"""Matrices in codes: codebooks, and one small matrix for every segment of the features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import randn
from test_packed import check
from torch import Tensor, nn

from lrc.maps import Chain, Codebook, Conv, Geometry, LinearMap, Segments, coded, fold, simplify

STRIDED = Geometry((2, 1), (1, 0), (1, 1))


def codes_of(count: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(0, k, (count,), generator=torch.Generator().manual_seed(seed))


def codebook(m: int, pieces: int, k: int, d: int, *, stored: torch.dtype = torch.float32, bias: bool = False) -> Codebook:
    added = randn(m, seed=7).float() if bias else None
    return Codebook.of(codes_of(m * pieces, k), randn(k, d, seed=1).to(stored), m, torch.float32, added)


def in_codes(stored: torch.dtype = torch.float32, *, images: bool = False) -> LinearMap:
    """Six outputs, four segments of 18 features (two channels of 3 x 3) in three dimensions, five codewords."""
    segments = Segments(randn(3, 18, seed=2).float(), 4, sizes=(3, 3) if images else (), geometry=STRIDED if images else None)
    return coded(codes_of(24, 5), randn(5, 3, seed=1), segments, 6, stored, randn(6, seed=3).float())


@settings(max_examples=25, deadline=None)
@given(k=st.sampled_from([2, 3, 16, 100, 300]), m=st.integers(1, 9), pieces=st.integers(1, 5), d=st.integers(1, 4),
       half=st.booleans(), bias=st.booleans())  # fmt: skip
def test_a_codebook_is_what_it_says(k: int, m: int, pieces: int, d: int, half: bool, bias: bool) -> None:
    made = codebook(m, pieces, k, d, stored=torch.float16 if half else torch.float32, bias=bias)
    check(made)
    expected = made.codebook.float()[codes_of(m * pieces, k)].reshape(m, pieces * d)
    assert torch.equal(made.dense().weight, expected)
    floating = sum(t.numel() for t in [*made.parameters(), *made.buffers()] if t.is_floating_point())
    assert floating + made.packed_numbers == made.cost().parameters


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_segments_are_a_block_diagonal_matrix(stored: torch.dtype) -> None:
    made = Segments(randn(3, 4, seed=1).to(stored), 5, torch.float32, randn(15, seed=2).float())
    check(made)
    assert torch.equal(made.dense().weight, torch.kron(torch.eye(5), made.basis.detach().float()))
    assert made.matrix().requires_grad == (stored == torch.float32)


def test_a_row_that_is_not_made_of_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 numbers are not made of pieces of 3"):
        Codebook(torch.zeros(4, dtype=torch.uint8), torch.zeros(2, 3), (2, 10))
    with pytest.raises(ValueError, match="hold no whole channels of 9"):
        Segments(torch.zeros(2, 12), 2, sizes=(3, 3), geometry=STRIDED)


def test_the_gradient_of_a_codeword_is_the_sum_over_its_pieces() -> None:
    made, x = codebook(6, 4, 5, 3), randn(7, 12, seed=4).float().requires_grad_()
    made(x).square().sum().backward()
    W = made.dense().weight.requires_grad_()
    nn.functional.linear(x.detach(), W).square().sum().backward()  # type: ignore[no-untyped-call]
    assert W.grad is not None
    by_hand = torch.stack([W.grad.reshape(-1, 3)[codes_of(24, 5) == j].sum(0) for j in range(5)])
    torch.testing.assert_close(made.codebook.grad, by_hand)
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ W.detach().T) @ W.detach())


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_merged_weight_gives_what_the_codes_give(images: bool, stored: torch.dtype) -> None:
    """Invariant 9 of LR2VQ: one dense map or convolution is equal to codebook and segments."""
    made = in_codes(stored, images=images)
    x = randn(2, 8, 7, 6, seed=5).float() if images else randn(4, 72, seed=5).float()
    whole = fold(made)
    assert isinstance(whole, Conv) == images
    torch.testing.assert_close(whole(x), made(x), atol=1e-5, rtol=1e-6)
    assert simplify(made).map is made


def test_what_is_stored_in_float16_is_not_trained_and_no_cast_changes_it() -> None:
    made = in_codes(torch.float16)
    stored = {name: tensor.clone() for name, tensor in made.state_dict().items() if not name.endswith("bias")}
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    made.double()
    assert made(randn(2, 72, seed=1)).dtype == torch.float64
    assert all(made.state_dict()[name].dtype == tensor.dtype for name, tensor in stored.items())
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in stored.items())


def test_the_text_of_a_map_in_codes() -> None:
    assert repr(in_codes()) == "Chain(Codebook[6,12; 5x3], Segments[4x3,18])"
    assert isinstance(in_codes(), Chain)
    assert in_codes(torch.float16).cost().bytes == 24 * 3 // 8 + 2 * (5 * 3 + 3 * 18) + 4 * 6
