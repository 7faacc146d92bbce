"""A graph that runs block by block: of all that it computes, backward finds what stands between blocks, and the rest again.

    x -> block 0 -> h -> block 1 -> h -> ... -> output      h is kept; what a block computes inside is computed a second time

Source: Chen et al. (2016), arXiv:1604.06174, with the cuts between repeated blocks. Gradients are the same bits: the second
time the same operations read the same values and draw the same random numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lrc.errors import UsageError
from lrc.measure.blocks import segments
from lrc.measure.collect import is_in_place
from lrc.program import Program
from lrc.program.late import LateGraphModule

aten = torch.ops.aten


class Block(nn.Module):
    """A part of a graph. reads: the names of the values that it takes; gives: of those that are read behind it."""

    def __init__(self, graph_module: fx.GraphModule, reads: Sequence[str], gives: Sequence[str], *, again: bool) -> None:
        super().__init__()
        self.part, self.reads, self.gives, self.again = graph_module, tuple(reads), tuple(gives), again

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Return the values that are read behind the block."""
        if self.again and torch.is_grad_enabled():
            found: tuple[Any, ...] = checkpoint(self.part, *values, use_reentrant=False)
            return found
        given: tuple[Any, ...] = self.part(*values)
        return given


class InBlocks(nn.Module):
    """A graph module as a row of blocks that share its tensors. notes: which blocks are kept whole, and why."""

    def __init__(self, graph_module: fx.GraphModule, parts: Sequence[Sequence[fx.Node]], *, recompute: bool) -> None:
        super().__init__()
        output = next(iter(reversed(graph_module.graph.nodes)))
        assert isinstance(output.args[0], Mapping), "a program returns a mapping"
        self.outputs = {name: value.name for name, value in output.args[0].items() if isinstance(value, fx.Node)}
        self.notes: list[str] = []
        made = []
        for place, part in enumerate(parts):
            reads, gives = crossing(part)
            why = reason(part) if recompute else ""
            if why and place < len(parts) - 1:
                self.notes.append(f"checkpointing: block {place + 1} of {len(parts)} is kept whole: {why}")
            again = recompute and not why and place < len(parts) - 1  # the last one's values are wanted at once
            graph = graph_of(part, reads, gives)
            names = ([node.name for node in reads], [node.name for node in gives])
            made.append(Block(LateGraphModule(graph_module, graph), *names, again=again))
        self.blocks = nn.ModuleList(made)
        last: dict[str, int] = {}
        for i, block in enumerate(made):
            last |= dict.fromkeys([*block.reads, *block.gives], i)
        wanted = set(self.outputs.values())
        self.dead = [[n for n, at in last.items() if at == i and n not in wanted] for i in range(len(made))]

    def forward(self, **inputs: Tensor) -> Mapping[str, Tensor]:
        """Return the outputs of the graph by name."""
        values: dict[str, Any] = dict(inputs)
        for block, dead in zip(self.blocks, self.dead, strict=True):
            assert isinstance(block, Block), "only blocks are in the list"
            values |= zip(block.gives, block(*(values[name] for name in block.reads)), strict=True)
            for name in dead:
                values.pop(name, None)
        return {name: values[node] for name, node in self.outputs.items()}


def in_blocks(program: Program, graph_module: fx.GraphModule, *, recompute: bool) -> InBlocks:
    """Return a graph module of `program` (or of its training mode) as its repeated blocks; one block where nothing repeats.

    recompute: compute the values inside of blocks again in the backward pass, in place of keeping them. Raises UsageError then
    for a graph in which nothing repeats.
    """
    ends = [part[-1].name for part in segments(program)]
    if recompute and len(ends) < 2:
        raise UsageError(
            "train.checkpointing", message="no blocks repeat in this graph, so that there is nothing to cut it at",
            hint="Set `checkpointing: false`, and lower `batch_size` with `accumulate` for less memory",
        )  # fmt: skip
    parts: list[list[fx.Node]] = [[]]
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        parts[-1].append(node)
        if node.name in ends[:-1]:
            parts.append([])
    return InBlocks(graph_module, [part for part in parts if part], recompute=recompute)


def crossing(part: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the values that a part reads from before it, and those of its own that are read behind it, in order."""
    inside = set(part)
    reads = dict.fromkeys(n for node in part for n in node.all_input_nodes if n not in inside and n.op != "get_attr")
    return list(reads), [node for node in part if any(user not in inside for user in node.users)]


def graph_of(part: Sequence[fx.Node], reads: Sequence[fx.Node], gives: Sequence[fx.Node]) -> fx.Graph:
    """Return a part as a graph of its own; stored tensors are read where they are used."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in reads}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in part:
        copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copies[node] for node in gives))
    graph.lint()
    return graph


def reason(part: Sequence[fx.Node]) -> str:
    """Return why a part cannot be computed twice, or an empty text."""
    for node in part:
        if is_in_place(node):
            return f"{node.name} changes a value in place"
        if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
            return f"{node.name} would update its running statistics twice"
    return ""
