"""random: both factors drawn, so that the adapter does not start at zero."""

import math
from typing import Literal

import torch

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser


class RandomBoth(InitialiserOptions):
    """Both factors random: the sum does not start as the base. PEFT's `false`, for tests and for training from scratch."""

    type: Literal["random"] = "random"


@initialiser(RandomBoth)
def random_both(start: Start, options: RandomBoth) -> Initial:
    """Return A and B uniform in ±1/sqrt(fan_in), as `nn.Linear` starts; at an embedding both standard normal."""
    out_features, in_features = start.shape
    A, B = torch.empty(start.rank, in_features), torch.empty(out_features, start.rank)
    if start.kind == "embedding":
        return Initial(B.normal_(generator=start.generator), A.normal_(generator=start.generator))
    for factor in (A, B):
        bound = 1.0 / math.sqrt(factor.shape[1])
        factor.uniform_(-bound, bound, generator=start.generator)
    return Initial(B, A)
