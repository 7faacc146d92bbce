"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.bag import Bag
from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.layouts import Bags, Indices, Layout, Patches, Rows, planned
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen
from lrc.maps.lookup import Lookup
from lrc.maps.norms import RmsNorm
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.places import Pick, Spread, pick_of, spread_of, without_pick, without_spread
from lrc.maps.quantized import Quantized
from lrc.maps.simplify import Folded, fold, rebuilt, simplify
from lrc.maps.sparse import Sparse
from lrc.maps.structure import pivoted_structure, restore, restore_module

__all__ = [
    "Affine",
    "Bag",
    "Bags",
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
    "Pick",
    "Pivoted",
    "Quantized",
    "RmsNorm",
    "Rows",
    "Scale",
    "Sparse",
    "Spread",
    "Structure",
    "Sum",
    "fold",
    "frozen",
    "permute_inputs",
    "permute_outputs",
    "pick_of",
    "pivoted_structure",
    "planned",
    "rebuilt",
    "restore",
    "restore_module",
    "simplify",
    "spread_of",
    "without_pick",
    "without_spread",
]
