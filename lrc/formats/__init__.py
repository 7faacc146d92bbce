"""How numbers are stored in a few bits: what a map keeps and a solver rounds to."""

from lrc.formats.base import Encoded, NumberFormat
from lrc.formats.choice import FORMATS, FormatField, format_of
from lrc.formats.integer import Integer
from lrc.formats.normalfloat import NormalFloat, normalfloat_values
from lrc.formats.packing import pack, packed_bytes, unpack
from lrc.formats.supports import BlockSupport, GroupSupport, Support, support_of

__all__ = [
    "FORMATS",
    "BlockSupport",
    "Encoded",
    "FormatField",
    "GroupSupport",
    "Integer",
    "NormalFloat",
    "NumberFormat",
    "Support",
    "format_of",
    "normalfloat_values",
    "pack",
    "packed_bytes",
    "support_of",
    "unpack",
]
