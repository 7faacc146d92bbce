"""A program's own copies of what will be trained: the captured module, and programs that share tensors, stay as they are."""

import copy
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from lrc.program.program import Program
from lrc.program.stored import standing, stored_tensors


def own(program: Program, trained: Collection[str], updated: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Give `program` copies of the parameters `trained` and of the buffers `updated`, in place of those that it shares.

    Every other parameter becomes one that shares its memory and is not trained, so that a backward pass computes and keeps
    nothing for it. Returns the trained parameters by name.
    """
    tensors = stored_tensors(program.graph_module)
    memo: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            value = tensor.detach().clone() if name in trained else tensor.detach()
            memo[id(tensor)] = nn.Parameter(value, requires_grad=name in trained)
        else:
            memo[id(tensor)] = tensor.detach().clone() if name in updated else tensor
    for old in program.originals.values():
        memo.setdefault(id(old), old)  # a weight whose place a map has taken
    program.graph_module = copy.deepcopy(program.graph_module, memo)
    program.__dict__.pop("nodes", None)
    for fqn in program.maps:
        program.maps[fqn] = standing(program.graph_module, program.site(fqn).uses[0].module)
    mapped = {use.module for fqn in program.maps for use in program.site(fqn).uses}
    changed = {n for n in (*trained, *updated) if not any(n.startswith(f"{module}.") for module in mapped)}
    program.changed |= changed
    program.originals = {n: memo[id(t)] if n in changed else t for n, t in program.originals.items()}
    program.sites = {fqn: replace(site, program=program) for fqn, site in program.sites.items()}
    found = dict(program.graph_module.named_parameters())
    return {name: found[name] for name in tensors if name in trained}
