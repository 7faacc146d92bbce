"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.simplify import Folded, fold, simplify
from lrc.maps.structure import chain_structure, pivoted_structure, restore

__all__ = [
    "Affine",
    "Chain",
    "Composite",
    "Cost",
    "Dense",
    "Diagonal",
    "Folded",
    "LinearMap",
    "Permutation",
    "Pivoted",
    "Scale",
    "Structure",
    "Sum",
    "chain_structure",
    "fold",
    "frozen",
    "permute_inputs",
    "permute_outputs",
    "pivoted_structure",
    "restore",
    "simplify",
]
