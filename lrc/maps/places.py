"""Maps that move features and hold no numbers: `Pick` reads some places of its input, `Spread` writes to some of its output."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.composites import Chain
from lrc.maps.leaves import Dense


class _Placed(LinearMap):
    """What both have: `kept` of `size` features, told by an index of 4 bytes an entry."""

    index: Tensor

    def __init__(self, index: Tensor, kept: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.kept, self.size, self._dtype = kept, size, dtype
        self.set_bias(None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that the map stands for; nothing floating is stored."""
        return self._dtype

    def cost(self, tokens: int = 1) -> Cost:
        """Return no numbers and no FLOPs, but the bytes of the index."""
        return Cost(0, self.index.numel() * self.index.element_size(), 0)

    def structure(self) -> Structure:
        """Return the sizes."""
        return {"map": self.word, "kept": self.kept, "size": self.size}

    @classmethod
    def restored(cls, structure: Structure) -> "_Placed":
        """Return an uninitialised map."""
        kept, size = structure["kept"], structure["size"]
        return cls(torch.arange(kept), size, torch.get_default_dtype())  # type: ignore[call-arg]  # of a leaf

    def places(self) -> Tensor:
        """Return the kept places, (kept,), int64, rising."""
        raise TypeError(f"{type(self).__name__} has no places")

    def rows(self) -> Tensor:
        """Return the rows of the identity at the kept places, (kept, size), float64."""
        return torch.eye(self.size, dtype=torch.float64, device=self.index.device)[self.places()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}[{self.out_features},{self.in_features}]"


class Pick(_Placed):
    """y = x[..., places]: (kept,) of (size,) features, places rising."""

    word: ClassVar[str] = "pick"

    def __init__(self, places: Tensor, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(places, len(places), size, dtype)
        self.out_features, self.in_features = len(places), size

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., size)."""
        return x.index_select(-1, self.index)

    def exact(self) -> Affine:
        """Return rows of the identity."""
        return Affine(self.rows(), None)

    def places(self) -> Tensor:
        """Return the index."""
        return self.index.long()


class Spread(_Placed):
    """y[..., places] = x, zeros elsewhere: (size,) of (kept,) features, places rising.

    The index says of every output which input it is; `kept`, one past the last, stands for zero.
    """

    word: ClassVar[str] = "spread"

    def __init__(self, places: Tensor, size: int, dtype: torch.dtype = torch.float32) -> None:
        kept = len(places)
        index = torch.full((size,), kept, dtype=torch.int32, device=places.device)
        index[places.long()] = torch.arange(kept, dtype=torch.int32, device=places.device)
        super().__init__(index, kept, size, dtype)
        self.out_features, self.in_features = size, kept

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., kept)."""
        return F.pad(x, (0, 1)).index_select(-1, self.index)

    def exact(self) -> Affine:
        """Return columns of the identity."""
        return Affine(self.rows().T, None)

    def places(self) -> Tensor:
        """Return the places that are written."""
        return (self.index < self.kept).nonzero()[:, 0]


def spread_of(made: LinearMap) -> Spread | None:
    """Return the places that a map writes its outputs to, where it ends so."""
    return made.slots[0] if isinstance(made, Chain) and isinstance(made.slots[0], Spread) and made.bias is None else None


def pick_of(made: LinearMap) -> Pick | None:
    """Return the places that a map reads of its inputs, where it starts so."""
    return made.slots[-1] if isinstance(made, Chain) and isinstance(made.slots[-1], Pick) else None


def without_spread(made: Chain) -> LinearMap:
    """Return the map that gives the kept outputs alone."""
    rest = made.slots[1:]
    if len(rest) == 1:
        return rest[0] if isinstance(rest[0], LinearMap) else Dense(rest[0])
    return Chain(*rest)


def without_pick(made: Chain) -> LinearMap:
    """Return the map that is given the kept inputs alone."""
    rest = made.slots[:-1]
    if len(rest) == 1 and not isinstance(rest[0], LinearMap):
        return Dense(rest[0], made.bias)
    return Chain(*rest, bias=made.bias)
