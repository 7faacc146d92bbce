"""The algebra of linear maps: leaves, composites, what they cost, and how they fold together."""

from lrc.maps.activation import ACTIVATIONS, Activation
from lrc.maps.bag import Bag
from lrc.maps.bag_layout import Bags
from lrc.maps.base import Affine, Cost, LinearMap, Structure
from lrc.maps.blocks import Blocks
from lrc.maps.bottleneck import Bottleneck
from lrc.maps.codebook import Codebook, code_bits
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.dropout import Dropout
from lrc.maps.expert_layout import Banks
from lrc.maps.experts import Experts
from lrc.maps.fold import fold
from lrc.maps.gate import Gate
from lrc.maps.kernels import computed_by
from lrc.maps.kronecker import Kronecker
from lrc.maps.layouts import Indices, JointRows, Layout, Patches, Rows, planned
from lrc.maps.leaves import Dense, Diagonal, Permutation, frozen, frozen_base
from lrc.maps.lookup import Lookup
from lrc.maps.low_rank import Factors, low_rank
from lrc.maps.norms import RmsNorm
from lrc.maps.permute import permute_inputs, permute_outputs
from lrc.maps.pivoted import Pivoted
from lrc.maps.places import Pick, Spread, pick_of, spread_of, without_pick, without_spread
from lrc.maps.quantized import Quantized
from lrc.maps.row_norm import RowNorm
from lrc.maps.scaled_outputs import scale_outputs
from lrc.maps.segments import Segments, coded
from lrc.maps.shared import SharedLookup, looked_up
from lrc.maps.simplify import Folded, rebuilt, simplify
from lrc.maps.small import Identity, OutputMask, Scalar
from lrc.maps.sparse import Sparse
from lrc.maps.sparse_low_rank import SparseLowRank
from lrc.maps.structure import pivoted_structure, restore, restore_module
from lrc.maps.triangular import Triangular
from lrc.maps.tucker import Tucker

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Affine",
    "Bag",
    "Bags",
    "Banks",
    "Blocks",
    "Bottleneck",
    "Chain",
    "Codebook",
    "Composite",
    "Conv",
    "ConvChain",
    "Cost",
    "Dense",
    "Diagonal",
    "Dropout",
    "Experts",
    "Factors",
    "Folded",
    "Gate",
    "Geometry",
    "Identity",
    "Indices",
    "JointRows",
    "Kronecker",
    "Layout",
    "LinearMap",
    "Lookup",
    "OutputMask",
    "Patches",
    "Permutation",
    "Pick",
    "Pivoted",
    "Quantized",
    "RmsNorm",
    "RowNorm",
    "Rows",
    "Scalar",
    "Scale",
    "Segments",
    "SharedLookup",
    "Sparse",
    "SparseLowRank",
    "Spread",
    "Structure",
    "Sum",
    "Triangular",
    "Tucker",
    "code_bits",
    "coded",
    "computed_by",
    "fold",
    "frozen",
    "frozen_base",
    "looked_up",
    "low_rank",
    "permute_inputs",
    "permute_outputs",
    "pick_of",
    "pivoted_structure",
    "planned",
    "rebuilt",
    "restore",
    "restore_module",
    "scale_outputs",
    "simplify",
    "spread_of",
    "without_pick",
    "without_spread",
]
