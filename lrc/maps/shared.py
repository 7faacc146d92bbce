"""One matrix that is multiplied in one place and looked up in another: a head, and the embedding that it is tied to."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, InParts, LinearMap, Structure, as_parameter
from lrc.maps.composites import Chain, chain_names
from lrc.maps.leaves import Dense
from lrc.maps.lookup import Lookup


class SharedLookup(InParts):
    """y = row x of the product B A (or B R A), for indices x: a row of B times the others, whose transpose is never made.

    The matrices are those of a chain for the same weight, (in_features, out_features), and have its names.
    """

    word: ClassVar[str] = "shared_lookup"
    bias: None

    def __init__(self, *parts: Tensor, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = tuple(names or chain_names(len(parts)))
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, as_parameter(part))
        self.in_features, self.out_features = parts[0].shape[0], parts[-1].shape[1]
        self.set_bias(None)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The matrices, the one that rows are looked up in first."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def weight(self) -> Tensor:
        """The table, multiplied out anew: for code that asks an embedding for its `weight`."""
        return self.dense().weight.T

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to indices of any shape; gives (*shape, out_features)."""
        table, *others = self.parts
        y = F.embedding(x, table)
        for part in others:
            y = y @ part
        return y

    def exact(self) -> Affine:
        """Return the transposed table in float64."""
        first, *others = (part.detach().double() for part in self.parts)
        for part in others:
            first = first @ part
        return Affine(first.T, None)

    def cost(self, tokens: int = 1) -> Cost:
        """Return the numbers of all matrices; those of the table cost no FLOPs."""
        size = sum(part.numel() for part in self.parts)
        return Cost(size, sum(p.numel() * p.element_size() for p in self.parts), 2 * tokens * (size - self.parts[0].numel()))

    def structure(self) -> Structure:
        """Return the sizes."""
        return {"map": self.word, "names": list(self.names), "shapes": [list(part.shape) for part in self.parts]}

    @classmethod
    def restored(cls, structure: Structure) -> "SharedLookup":
        """Return an uninitialised map."""
        return cls(*(torch.empty(*shape) for shape in structure["shapes"]), names=structure["names"])

    def __repr__(self) -> str:
        sizes = [part.shape[0] for part in self.parts] + [self.out_features]
        return f"SharedLookup[{','.join(map(str, sizes))}]{self.mark()}"


def looked_up(made: LinearMap) -> LinearMap:
    """Return the map that looks rows of a head's weight up, with the head's own parameters; a bias is the head's alone.

    Raises TypeError for a map whose rows cannot be read.
    """
    if isinstance(made, Dense):
        return Lookup(made.weight)
    if isinstance(made, Chain) and not any(isinstance(slot, LinearMap) for slot in made.slots):
        return SharedLookup(*made.slots, names=made.names)  # type: ignore[arg-type]  # none of them is a map
    raise TypeError(f"no row of {made!r} can be looked up")
