"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.blocks import Blocks
from lrc.maps.bottleneck import ACTIVATIONS, Bottleneck
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.dropout import Dropout
from lrc.maps.fold import fold
from lrc.maps.gate import Gate
from lrc.maps.kronecker import Kronecker
from lrc.maps.layouts import Indices, Layout, Patches, Rows, planned
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen, frozen_base
from lrc.maps.lookup import Lookup
from lrc.maps.low_rank import Factors, low_rank
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.row_norm import RowNorm
from lrc.maps.simplify import Folded, simplify
from lrc.maps.small import Identity, OutputMask
from lrc.maps.structure import pivoted_structure, restore
from lrc.maps.triangular import Triangular
from lrc.maps.tucker import Tucker

__all__ = [
    "ACTIVATIONS",
    "Affine",
    "Blocks",
    "Bottleneck",
    "Chain",
    "Composite",
    "Conv",
    "ConvChain",
    "Cost",
    "Dense",
    "Diagonal",
    "Dropout",
    "Factors",
    "Folded",
    "Gate",
    "Geometry",
    "Identity",
    "Indices",
    "Kronecker",
    "Layout",
    "LinearMap",
    "Lookup",
    "OutputMask",
    "Patches",
    "Permutation",
    "Pivoted",
    "RowNorm",
    "Rows",
    "Scale",
    "Structure",
    "Sum",
    "Triangular",
    "Tucker",
    "fold",
    "frozen",
    "frozen_base",
    "low_rank",
    "permute_inputs",
    "permute_outputs",
    "pivoted_structure",
    "planned",
    "restore",
    "simplify",
]
