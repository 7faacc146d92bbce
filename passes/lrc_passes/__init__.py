"""The rewriting rules that come with lrc. A third-party pass enters by the same door, the entry points `lrc.passes`."""

from lrc_passes.factorize import factorize
from lrc_passes.merge import merge
from lrc_passes.quantize import quantize
from lrc_passes.split import split

BUILTIN = (factorize, merge, quantize, split)
