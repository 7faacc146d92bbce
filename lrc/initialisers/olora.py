"""olora: the leading columns of the weight's QR decomposition, which the base gives up."""

from typing import ClassVar, Literal

import torch

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser, subtracted


class Olora(InitialiserOptions):
    """Q and R of the weight, cut at the rank; the frozen weight is what remains."""

    type: Literal["olora"] = "olora"
    changes_base: ClassVar[bool] = True


@initialiser(Olora)
def olora(start: Start, options: Olora) -> Initial:
    """Return B = Q[:, :r], A = R[:r] for W = Q R, and the base W - s B A.

    The factors are not divided by s, as in PEFT. They are no best approximation: they span the first r columns of W.
    Source: Büyükakyüz (2024), arXiv:2406.01775, equations 3 to 5.
    """
    W = start.weight()
    Q, R = torch.linalg.qr(W)
    return subtracted(start, W, Q[:, : start.rank].contiguous(), R[: start.rank].contiguous())
