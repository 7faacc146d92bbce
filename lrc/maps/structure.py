"""Maps as plain data and back: what `config.json` holds of every site."""

from collections.abc import Mapping
from typing import Any

import torch

from lrc.maps.bag import Bag
from lrc.maps.base import LinearMap, Structure
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain
from lrc.maps.leaves import Dense, Diagonal, Permutation
from lrc.maps.lookup import Lookup
from lrc.maps.pivoted import Pivoted
from lrc.maps.shared import SharedLookup

KINDS = (Dense, Diagonal, Permutation, Pivoted, Chain, Sum, Scale, Conv, ConvChain, Lookup, Bag, SharedLookup)
MAPS: dict[str, type[LinearMap]] = {kind.word: kind for kind in KINDS}


def restore(structure: Mapping[str, Any]) -> LinearMap:
    """Return a map of this structure with uninitialised numbers, on the current device and in the current dtype.

    Raises ValueError for a structure that no map has written.
    """
    try:
        kind = MAPS[structure["map"]]
        data: Structure = dict(structure)
        if issubclass(kind, Composite):
            data["parts"] = [_part(part) for part in data["parts"]]
        return kind.restored(data)
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"not the structure of a map: {structure!r}") from error


def _part(part: Any) -> Any:
    if not isinstance(part, list):
        return restore(part)
    rows, columns = part
    return torch.empty(rows, columns)


def pivoted_structure(out_features: int, rank: int, in_features: int, *, bias: bool) -> Structure:
    """Return the structure of a rank-r product in pivoted form with its index, without making one."""
    shape = [out_features, in_features]
    return {"map": Pivoted.word, "shape": shape, "rank": rank, "side": "out", "index": True, "bias": bias}
