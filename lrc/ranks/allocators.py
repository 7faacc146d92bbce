"""The allocators that come with lrc. A third-party one enters by the same door, the entry points `lrc.allocators`."""

from typing import Any

from lrc.ranks.allocate import automatic, shared_globally, shared_uniformly
from lrc.ranks.block_influence import shared_by_influence
from lrc.ranks.exact import shared_exactly
from lrc.ranks.learned import where_learning_starts
from lrc.ranks.log_inverse import shared_by_log_inverse
from lrc.ranks.sensitivity_bisect import shared_by_sensitivity
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (
    automatic,
    shared_globally,
    shared_exactly,
    shared_uniformly,
    shared_by_log_inverse,
    shared_by_influence,
    shared_by_sensitivity,
    where_learning_starts,
)
