"""A constant in front of a product acts where the product is narrow, and means the same."""

import torch
from random_maps import randn

from lrc.maps import Chain, Dense, Scale


def test_a_scaled_product_is_the_scaled_weight_however_its_outermost_part_is_held() -> None:
    B, A, b, x = randn(7, 2, seed=0), randn(2, 5, seed=1), randn(7, seed=2), randn(3, 5, seed=3)
    for scale in (1.0, -0.75):
        plain = Scale(Chain(B, A), scale, b)
        assert torch.allclose(plain(x), scale * x @ A.T @ B.T + b, rtol=0, atol=1e-13)
        own = Scale(Chain(Dense(B, b), A), scale)
        assert torch.allclose(own(x), scale * (x @ A.T @ B.T + b), rtol=0, atol=1e-13)
        biased = Scale(Chain(B, A, bias=b), scale)
        assert torch.allclose(biased(x), scale * (x @ A.T @ B.T + b), rtol=0, atol=1e-13)


def test_the_gradients_of_both_factors_have_the_scale() -> None:
    made = Scale(Chain(randn(4, 2, seed=0), randn(2, 6, seed=1)), 3.0)
    x, sent = randn(5, 6, seed=2), randn(5, 4, seed=3)
    made(x).backward(sent)
    B, A = (part.detach() for part in made.inner.slots)
    assert torch.allclose(made.inner.B.grad, 3 * sent.T @ (x @ A.T), rtol=0, atol=1e-12)
    assert torch.allclose(made.inner.A.grad, 3 * B.T @ sent.T @ x, rtol=0, atol=1e-12)
