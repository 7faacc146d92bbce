"""gaussian: A normal, B zero."""

from typing import Literal

import torch

from lrc.initialisers.base import Initial, InitialiserOptions, Start, initialiser
from lrc.initialisers.kaiming import embedding_start


class Gaussian(InitialiserOptions):
    """A normal with standard deviation 1/rank, B zero; at an embedding A zero, B standard normal."""

    type: Literal["gaussian"] = "gaussian"


@initialiser(Gaussian)
def gaussian(start: Start, options: Gaussian) -> Initial:
    """Return A ~ N(0, 1/rank²) and B = 0: the sum starts as the base. An embedding has A = 0 and B ~ N(0, 1).

    Source: Hu et al. (2022), arXiv:2106.09685, section 4.1; the deviation is that of PEFT.
    """
    out_features, in_features = start.shape
    if start.kind == "embedding":
        return embedding_start(start)
    A = torch.empty(start.rank, in_features).normal_(0.0, 1.0 / start.rank, generator=start.generator)
    return Initial(torch.zeros(out_features, start.rank), A)
