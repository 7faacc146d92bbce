"""Batch norms that follow a site: in eval mode each is a scale and a shift of every feature of what the site gives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import LinearMap
from lrc.program.edits import put
from lrc.program.program import Program
from lrc.program.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm in eval mode: y = scale * x + shift, feature by feature.

    node: its name in the graph; module: the module that does nothing else; scale, shift: (features,), float64; numbers,
    bytes: how many floating numbers it stores, and what all that it stores takes.
    """

    node: str
    module: str
    scale: Tensor
    shift: Tensor
    numbers: int
    bytes: int


def norm_node(program: Program, site: Site) -> fx.Node | None:
    """Return the batch norm in eval mode that reads what a site gives and keeps statistics of its own, or None."""
    readers = [user for use in site.uses for user in program.nodes[use.node].users]
    for node in readers:
        if node.target == aten.batch_norm.default and not node.args[5]:
            kept = [isinstance(read, fx.Node) and read.op == "get_attr" and len(read.users) == 1 for read in node.args[3:5]]
            if all(kept):
                return node
    return None


def set_statistics(program: Program, statistics: Mapping[str, Tensor]) -> None:
    """Put other statistics of batch norms in place, by the names of their buffers; the captured module keeps its own."""
    for name, value in statistics.items():
        put(program.graph_module, name, value)
    program.changed |= statistics.keys()


def norm_after(program: Program, site: Site) -> BatchNorm | str | None:
    """Return the batch norm that alone reads what a site gives, the reason why there is one that cannot be folded, or None."""
    readers = [user for use in site.uses for user in program.nodes[use.node].users]
    found = next((node for node in readers if node.target == aten.batch_norm.default), None)
    if found is None:
        return None
    if len(site.uses) > 1:
        return f"the weight is used {len(site.uses)} times"
    if len(readers) > 1:
        return f"{len(readers)} operations read what it gives, not the batch norm alone"
    return _read(program, site, found)


def _read(program: Program, site: Site, node: fx.Node) -> BatchNorm | str:
    x, weight, bias, mean, variance, training, _, eps, *_ = node.args
    if training:
        return "the batch norm takes its statistics from the batch"
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if site.kind == "linear" and not (isinstance(value, Tensor) and value.ndim == 2):
        return "the batch norm is not over the features of the linear"
    names = [read.target if isinstance(read, fx.Node) and read.op == "get_attr" else None for read in (mean, variance)]
    if None in names:
        return "the batch norm has no stored statistics"
    owner = str(names[0]).rpartition(".")[0]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    running = str(stack[-1][0]).removeprefix("L['self'].").strip(".") if stack else owner
    if running != owner:
        return "the batch norm is computed by a larger module"
    if _calls(program, owner) > 1:
        return f"the batch norm {owner} is used more than once"
    tensors = dict(program.graph_module.named_parameters()) | dict(program.graph_module.named_buffers())
    scale, shift = _affine(tensors, [weight, bias, mean, variance], float(eps))  # type: ignore[arg-type]
    stored = [tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == owner]
    numbers = sum(tensor.numel() for tensor in stored if tensor.is_floating_point())
    return BatchNorm(node.name, owner, scale, shift, numbers, sum(t.numel() * t.element_size() for t in stored))


def _affine(tensors: Mapping[str, Tensor], reads: list[Any], eps: float) -> tuple[Tensor, Tensor]:
    """Return scale = weight / sqrt(variance + eps) and shift = bias - scale * mean, in float64."""
    weight, bias, mean, variance = (None if read is None else tensors[str(read.target)].detach() for read in reads)
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else weight.double() * scale
    shift = -scale * mean.double()
    return scale, shift if bias is None else bias.double() + shift


def _calls(program: Program, owner: str) -> int:
    """Return how many batch norms of the graph read the statistics of a module."""
    nodes = program.graph_module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    return sum(str(node.args[3].target).rpartition(".")[0] == owner for node in nodes if isinstance(node.args[3], fx.Node))


def fold_norm(program: Program, fqn: str, norm: BatchNorm, made: LinearMap, by: str) -> None:
    """Put `made`, which does what a site and the norm after it do, at the site, and take the norm out of the graph.

    The norm's module does nothing from then on: grafting puts an identity in its place.
    """
    program.replace(fqn, made, by, settle=False)
    graph = program.graph_module.graph
    node, gives = program.nodes[norm.node], program.nodes[program.sites[fqn].uses[0].node]
    reads = node.all_input_nodes
    node.replace_all_uses_with(gives)
    graph.erase_node(node)
    for read in reads:
        if read.op == "get_attr" and not read.users:
            graph.erase_node(read)
    for idle in list(graph.find_nodes(op="get_attr")):
        if not idle.users and str(idle.target).rpartition(".")[0] == norm.module:
            graph.erase_node(idle)
    program.graph_module.delete_submodule(norm.module)
    program.__dict__.pop("nodes", None)
    program.idle = (*program.idle, norm.module)
    for name, site in program.sites.items():
        if any(use.input == norm.node for use in site.uses):
            uses = tuple(replace(use, input=gives.name) if use.input == norm.node else use for use in site.uses)
            program.sites[name] = replace(site, uses=uses)
