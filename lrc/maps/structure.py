"""Maps as plain data and back: what `config.json` holds of every site."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrc.maps.activation import Activation
from lrc.maps.bag import Bag
from lrc.maps.base import LinearMap, Structure
from lrc.maps.blocks import Blocks
from lrc.maps.bottleneck import Bottleneck
from lrc.maps.codebook import Codebook
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain
from lrc.maps.dropout import Dropout
from lrc.maps.experts import Experts
from lrc.maps.gate import Gate
from lrc.maps.kronecker import Kronecker
from lrc.maps.leaves import Dense, Diagonal, Permutation
from lrc.maps.lookup import Lookup
from lrc.maps.norms import RmsNorm
from lrc.maps.pivoted import Pivoted
from lrc.maps.places import Pick, Spread
from lrc.maps.quantized import Quantized
from lrc.maps.row_norm import RowNorm
from lrc.maps.segments import Segments
from lrc.maps.shared import SharedLookup
from lrc.maps.small import Identity, OutputMask, Scalar
from lrc.maps.sparse import Sparse
from lrc.maps.sparse_low_rank import SparseLowRank
from lrc.maps.triangular import Triangular
from lrc.maps.tucker import Tucker

KINDS: tuple[type[LinearMap], ...] = (
    Dense, Diagonal, Permutation, Pivoted, Chain, Sum, Scale, Conv, ConvChain, Lookup, Pick, Spread, Quantized, Sparse,
    SparseLowRank, Bag, Gate, Triangular, Blocks, Tucker, Kronecker, Identity, Dropout, OutputMask, Bottleneck, RowNorm,
    SharedLookup, Experts, Codebook, Segments, Scalar, Activation,
)  # fmt: skip
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


def restore_module(structure: Mapping[str, Any]) -> nn.Module:
    """Return a map, or a norm without numbers, of this structure. Raises ValueError for one that neither has written."""
    return RmsNorm.restored(dict(structure)) if structure.get("map") == RmsNorm.word else restore(structure)


def _part(part: Any) -> Any:
    if not isinstance(part, list):
        return restore(part)
    rows, columns = part
    return torch.empty(rows, columns)


def pivoted_structure(out_features: int, rank: int, in_features: int, *, bias: bool) -> Structure:
    """Return the structure of a rank-r product in pivoted form with its index, without making one."""
    shape = [out_features, in_features]
    return {"map": Pivoted.word, "shape": shape, "rank": rank, "side": "out", "index": True, "bias": bias}
