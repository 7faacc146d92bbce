"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.bag import Bag
from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.layouts import Bags, Indices, JointRows, Layout, Patches, Rows, planned
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen
from lrc.maps.lookup import Lookup
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.shared import SharedLookup, looked_up
from lrc.maps.simplify import Folded, fold, simplify
from lrc.maps.structure import pivoted_structure, restore

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
    "JointRows",
    "Layout",
    "LinearMap",
    "Lookup",
    "Patches",
    "Permutation",
    "Pivoted",
    "Rows",
    "Scale",
    "SharedLookup",
    "Structure",
    "Sum",
    "fold",
    "frozen",
    "looked_up",
    "permute_inputs",
    "permute_outputs",
    "pivoted_structure",
    "planned",
    "restore",
    "simplify",
]
