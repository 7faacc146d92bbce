"""The rewriting rules that come with lrc. A third-party pass enters by the same door, the entry points `lrc.passes`."""

from lrc_passes.activate import activate
from lrc_passes.adapt import AdaptPass
from lrc_passes.auto import auto
from lrc_passes.factorize import factorize
from lrc_passes.fold_norms import FoldNormsPass
from lrc_passes.fuse_tables import FuseTablesPass
from lrc_passes.load_adapter import LoadAdapterPass
from lrc_passes.merge import merge
from lrc_passes.prune import PrunePass
from lrc_passes.quantize import quantize
from lrc_passes.reestimate_norms import ReestimateNormsPass
from lrc_passes.slice import SlicePass
from lrc_passes.split import split
from lrc_passes.train import TrainPass

BUILTIN = (
    activate, AdaptPass, auto, factorize, FoldNormsPass, FuseTablesPass, LoadAdapterPass, merge, PrunePass, quantize,
    ReestimateNormsPass, SlicePass, split, TrainPass,
)  # fmt: skip
