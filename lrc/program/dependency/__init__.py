"""Dependency groups: what can only be taken out of a graph together, found by what its operations do.

Every index of a dimension that something stored has (a row of a weight, a channel of a batch norm) gets a label. The labels
flow through the graph: an addition ties those of its operands, a view into heads those of one head, a contraction those of
what is summed. What is tied to something that cannot be cut stays. What is left are units that can go, one by one.

Source: Fang et al. (2023), DepGraph, arXiv:2301.12900; here index by index, so that heads, concatenations and groups need no
index maps of their own.
"""

from lrc.program.dependency.cut import cut_map, cut_units, living
from lrc.program.dependency.groups import Group, Groups, Member, find_groups

__all__ = ["Group", "Groups", "Member", "cut_map", "cut_units", "find_groups", "living"]
