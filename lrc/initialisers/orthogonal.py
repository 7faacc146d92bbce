"""orthogonal: two random factors whose product is zero."""

from typing import Literal

import torch

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser


class Orthogonal(InitialiserOptions):
    """Two random factors that annihilate each other: B A = 0, neither of them zero. The rank is even."""

    type: Literal["orthogonal"] = "orthogonal"

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return why an odd rank has no such start."""
        return f"`init: orthogonal` needs an even rank, got {rank}" if rank % 2 else super().obstacle(kind, shape, rank)


@initialiser(Orthogonal)
def orthogonal(start: Start, options: Orthogonal) -> Initial:
    """Return A = (N Q_odd)ᵀ / 10 and B = M Q_even / 10, Q the rows of a random orthogonal matrix, N and M standard normal.

    As in PEFT, after https://datta0.github.io/posts/rethink-lora-init/.
    """
    out_features, in_features = start.shape
    half = start.rank // 2
    Q, _ = torch.linalg.qr(torch.randn(start.rank, start.rank, generator=start.generator))
    N = torch.randn(in_features, half, generator=start.generator)
    M = torch.randn(out_features, half, generator=start.generator)
    return Initial(M @ Q[1::2] / 10, (N @ Q[0::2]).T.contiguous() / 10)
