"""loftq: the base becomes a quantised weight, and the factors start at what that lost."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from scipy.stats import norm
from torch import Tensor

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser

BLOCK = 64
OFFSET = 0.9677083  # the largest quantile that NormalFloat uses


class Loftq(InitialiserOptions):
    """A NormalFloat base, dequantised, and factors that make up for its error, in turns."""

    type: Literal["loftq"] = "loftq"
    bits: Literal[2, 4, 8] = Field(default=4, description="Of the quantised base.")
    iterations: int = Field(default=1, ge=1, description="How often the weight is quantised and its error decomposed.")
    changes_base: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})


@initialiser(Loftq)
def loftq(start: Start, options: Loftq) -> Initial:
    """Return B, A with B A the best rank-r approximation of W - Q, Q the quantised W - B A, and the base Q.

    The scaling is not made up for: alpha = rank is meant, as in PEFT. float32. Source: Li et al. (2024), arXiv:2310.08659,
    algorithm 1; NormalFloat: Dettmers et al. (2023), arXiv:2305.14314, section 3, in blocks of 64.
    """
    W = start.weight()
    rest = W
    for _ in range(options.iterations):
        quantised = normal_float(rest, options.bits)
        U, S, Vh = torch.linalg.svd(W - quantised, full_matrices=False)
        root = S[: start.rank].sqrt()
        B, A = U[:, : start.rank] * root, root[:, None] * Vh[: start.rank]
        rest = W - B @ A
    notes = () if start.scaling == 1 else (f"LoftQ is meant for a scaling of 1, this adapter's is {start.scaling:g}",)
    return Initial(B, A, base=quantised, notes=notes)


def normal_float(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to NormalFloat levels in blocks of 64 numbers, dequantised; the last block may be shorter."""
    levels = normal_levels(bits).to(weight)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / largest.masked_fill(largest == 0, 1.0)
    middle = (levels[1:] + levels[:-1]) / 2
    made = levels[torch.bucketize(scaled, middle)] * largest
    return made.flatten()[: weight.numel()].reshape(weight.shape)


def normal_levels(bits: int) -> Tensor:
    """Return the 2**bits levels in [-1, 1], ascending, float32: quantiles of a normal distribution, 0 among them."""
    half = 2 ** (bits - 1)
    above = torch.from_numpy(norm.ppf(torch.linspace(OFFSET, 0.5, half + 1)[:-1].numpy()))
    below = -torch.from_numpy(norm.ppf(torch.linspace(OFFSET, 0.5, half)[:-1].numpy()))
    levels = torch.cat([above, below, above.new_zeros(1)]).float().sort().values
    return levels / levels.max()
