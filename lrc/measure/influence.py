"""How much every repeated block changes what passes through it: 1 - cosine of its input and its output."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lrc.measure.cache import Cache, digest
from lrc.measure.taps import padding_masks, placeholder_values, row_mask, traced_masks
from lrc.program import Program

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """A repeated block: the name that its modules share, the node that it reads and the one that it gives."""

    name: str
    reads: fx.Node
    gives: fx.Node


def block_name(fqn: str) -> str:
    """Return the part of a name up to its first number, `model.layers.3` of a layer's weight, or "" where it has none."""
    parts = fqn.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if place is None else ".".join(parts[: place + 1])


def find_blocks(program: Program, names: Iterable[str]) -> dict[str, Block]:
    """Return the blocks of these names whose input and output the graph shows; both have the same shape.

    A block is what was traced inside of the modules whose names start with its own. Its output is the last value inside that
    something outside reads, its input the last value of that traced shape that it reads from outside.
    """
    order = {node: i for i, node in enumerate(program.graph_module.graph.nodes)}
    members: dict[str, set[fx.Node]] = {name: set() for name in names if name}
    for node in order:
        for name in {block_name(path) for path in _module_paths(node)} & members.keys():
            members[name].add(node)
    found = {}
    for name, inside in members.items():
        given = [n for n in inside if any(user not in inside for user in n.users) and _floating(n)]
        read = {source for n in inside for source in n.all_input_nodes if source not in inside and _floating(source)}
        for gives in sorted(given, key=order.__getitem__, reverse=True):
            like = [n for n in read if _shape(n) == _shape(gives)]
            if like:
                found[name] = Block(name, max(like, key=order.__getitem__), gives)
                break
    return found


def block_influence(program: Program, batches: Sequence[Batch], names: Iterable[str], cache: Cache) -> dict[str, float]:
    """Return 1 - the mean cosine, over unpadded rows, of what every block reads and gives; blocks not found are left out.

    A row is a token, or a position of an image. Between 0 (nothing is changed but the length) and 2. Kept in the cache by
    program and data. Source: Men et al., ShortGPT (2024), arXiv:2403.03853, equation 1.
    """
    blocks = find_blocks(program, names)
    key = f"{digest('influence-1', program.digest(), list(batches), sorted(blocks), torch.__version__)}-influence"
    stored = cache.get(key)
    if stored is None:
        watch = Watch(program, blocks.values())
        for batch in batches:
            watch.add(batch)
        stored = {name: torch.tensor(watch.sums[name] / max(watch.rows[name], 1)) for name in blocks}
        if stored:
            cache.put(key, stored)
    return {name: float(stored[name]) for name in blocks}


class Watch(fx.Interpreter):
    """Runs batches through the graph and adds up the cosine distances of blocks."""

    def __init__(self, program: Program, blocks: Iterable[Block]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.at: dict[fx.Node, list[Block]] = {}
        for block in blocks:
            self.at.setdefault(block.gives, []).append(block)
        self.read = {block.reads for of_node in self.at.values() for block in of_node}
        self.sums = {block.name: 0.0 for of_node in self.at.values() for block in of_node}
        self.rows = dict.fromkeys(self.sums, 0)
        self.traced = traced_masks(program)
        self.seen: dict[fx.Node, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Add one batch."""
        self.seen, self.masks = {}, padding_masks(batch)
        with torch.no_grad():
            self.run(*placeholder_values(self.program, batch))
        self.seen = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; compare where a block ends."""
        value = super().run_node(n)
        for block in self.at.get(n, ()):
            self._compare(block, n, value)
        if n in self.read:
            self.seen[n] = value.detach().clone()
        return value

    def _compare(self, block: Block, n: fx.Node, value: Tensor) -> None:
        features = 1 if value.ndim == 4 else -1  # channels of an image
        cosine = F.cosine_similarity(self.seen[block.reads].double(), value.detach().double(), dim=features).reshape(-1)
        mask = None if value.ndim == 4 else row_mask(n, value, self.masks, self.traced)
        if mask is not None:
            cosine = cosine[mask]
        self.sums[block.name] += float((1 - cosine).sum())
        self.rows[block.name] += len(cosine)


def _module_paths(node: fx.Node) -> list[str]:
    """Return the names of the modules that a node was traced inside of."""
    stack = node.meta.get("nn_module_stack") or {}
    return [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _shape(node: fx.Node) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
