"""What is remembered of an adapter beside its map."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Adapted:
    """What is remembered of an adapter beside its map: for exchange with other libraries.

    alpha: as configured. init: the initialiser's name. initial: (B, A) at the start where the frozen weight was changed by
    them, so that the change can be given back. options: everything else that the method was told.
    """

    method: str
    rank: int
    alpha: float | None
    scaling: float
    init: str | None = None
    dropout: float = 0.0
    initial: tuple[Tensor, Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
