"""Layers that are alike: of one shape, at the same place of blocks that follow each other, found in the graph's own order."""

import re
from collections.abc import Sequence

from torch import Tensor, fx

from lrc.program.absorb import aten
from lrc.program.program import Program

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

CARRIES = {
    aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
}  # fmt: skip


def alike(program: Program, fqns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return `fqns` in runs of layers that are alike, each in graph order; a layer like no other is a run of one.

    Two layers are alike where their names differ by the number of the block alone, and shape, dtype, layout and bias are the
    same. A run ends where a number is missing: what is not adjacent is not in one run.
    """
    runs: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    order = {name: i for i, name in enumerate(program.nodes)}
    first = {fqn: min(order[use.node] for use in program.site(fqn).uses) for fqn in fqns}
    alone: list[tuple[str, ...]] = []
    for fqn in sorted(fqns, key=lambda fqn: first[fqn]):
        site, numbers = program.site(fqn), NUMBER.findall(fqn)
        if not numbers or site.kind != "linear" or len(site.uses) > 1 or site.looped:
            alone.append((fqn,))
            continue
        kind = NUMBER.sub("*", fqn, count=1)
        key = (kind, site.shape, site.dtype, site.layout, site.bias is None)
        runs.setdefault(key, []).append((int(numbers[0]), fqn))
    found = list(alone)
    for members in runs.values():
        run: list[str] = []
        last = None
        for number, fqn in members:
            if last is not None and number != last + 1:
                found.append(tuple(run))
                run = []
            run.append(fqn)
            last = number
        found.append(tuple(run))
    return sorted(found, key=lambda run: first[run[0]])


def is_added_back(program: Program, fqn: str) -> bool:
    """Say whether a site's output is added, as it is, to another computed value: the end of a residual branch."""
    node = program.nodes[program.site(fqn).uses[0].node]
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in CARRIES:
            node = user
            continue
        if user.target not in (aten.add.Tensor, aten.add_.Tensor):
            return False
        others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node and arg.op != "get_attr"]
        return any(isinstance(other.meta.get("val"), Tensor) for other in others)
    return False
