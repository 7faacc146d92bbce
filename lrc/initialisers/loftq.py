"""loftq: the base becomes a quantised weight, and the factors start at what that lost."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from lrc.formats import NormalFloat
from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser


class Loftq(InitialiserOptions):
    """A NormalFloat base, dequantised, and factors that make up for its error, in turns."""

    type: Literal["loftq"] = "loftq"
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Of the quantised base.")
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
    form, rest = NormalFloat(bits=options.bits, scale_bits=None), W  # scales as they are, as PEFT has them
    for _ in range(options.iterations):
        quantised = form.rounded(rest)
        U, S, Vh = torch.linalg.svd(W - quantised, full_matrices=False)
        root = S[: start.rank].sqrt()
        B, A = U[:, : start.rank] * root, root[:, None] * Vh[: start.rank]
        rest = W - B @ A
    notes = () if start.scaling == 1 else (f"LoftQ is meant for a scaling of 1, this adapter's is {start.scaling:g}",)
    return Initial(B, A, base=quantised, notes=notes)
