"""kaiming: A uniform, B zero."""

import math
from typing import Literal

import torch

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser


class Kaiming(InitialiserOptions):
    """A uniform in ±1/sqrt(in_features), B zero; at an embedding A zero, B standard normal. PEFT's `true`."""

    type: Literal["kaiming"] = "kaiming"


@initialiser(Kaiming)
def kaiming(start: Start, options: Kaiming) -> Initial:
    """Return A ~ U(±sqrt(6 / ((1 + 5) fan_in))), fan_in = in_features, and B = 0: the sum starts as the base.

    An embedding has A = 0 and B ~ N(0, 1), as loralib and PEFT have it. Sources: Hu et al. (2022), arXiv:2106.09685, section
    4.1; He et al. (2015), arXiv:1502.01852, with a = sqrt(5) as the authors' code has it.
    """
    out_features, in_features = start.shape
    if start.kind == "embedding":
        return embedding_start(start)
    bound = 1.0 / math.sqrt(in_features)
    A = torch.empty(start.rank, in_features).uniform_(-bound, bound, generator=start.generator)
    return Initial(torch.zeros(out_features, start.rank), A)


def embedding_start(start: Start) -> Initial:
    """Return A = 0 and B ~ N(0, 1)."""
    out_features, in_features = start.shape
    B = torch.empty(out_features, start.rank).normal_(generator=start.generator)
    return Initial(B, torch.zeros(start.rank, in_features))
