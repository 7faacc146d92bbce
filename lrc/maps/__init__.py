"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.layouts import Indices, Layout, Patches, Rows, planned
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen
from lrc.maps.lookup import Lookup
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.quantized import Quantized
from lrc.maps.simplify import Folded, fold, rebuilt, simplify
from lrc.maps.sparse import Sparse
from lrc.maps.structure import pivoted_structure, restore

__all__ = [
    "Affine",
    "Chain",
    "Composite",
    "Conv",
    "ConvChain",
    "Cost",
    "Dense",
    "Diagonal",
    "Folded",
    "Geometry",
    "Indices",
    "Layout",
    "LinearMap",
    "Lookup",
    "Patches",
    "Permutation",
    "Pivoted",
    "Quantized",
    "Rows",
    "Scale",
    "Sparse",
    "Structure",
    "Sum",
    "fold",
    "frozen",
    "permute_inputs",
    "permute_outputs",
    "pivoted_structure",
    "planned",
    "rebuilt",
    "restore",
    "simplify",
]
