"""The edit of a graph whose residual stream gets another width: maps, norms, embeddings and the additions between bases."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from lrc.maps import Indices, LinearMap, RmsNorm
from lrc.program.edits import erase_unused, put
from lrc.program.norms import inside_norm
from lrc.program.program import Program
from lrc.program.residual import Stream
from lrc.program.sites import Use

BY = "slice"
REASON = "the residual connections hold matrices of their own (`bases: block`), for which the user's module has no place"


def narrow_stream(
    program: Program, stream: Stream, width: int, maps: Mapping[str, LinearMap], shortcuts: Mapping[tuple[int, int], LinearMap]
) -> None:
    """Put the maps of another width in place, norms without numbers for the old ones, and a matrix wherever bases meet.

    maps: of every reader and writer, and of the embeddings that are no sites. shortcuts: by the bases before and after.
    """
    for fqn in {**stream.readers, **stream.writers}:
        program.replace(fqn, maps[fqn], BY, settle=False, resize=True)
    program.__dict__.pop("nodes", None)
    for module in stream.embeddings:
        _embedding(program, stream, module, maps[module])
    for norm in stream.norms:
        _norm(program, norm.fqn, norm.reads, norm.gives, RmsNorm(stream.width, norm.eps))
    graph, nodes = program.graph_module.graph, program.nodes
    for place, cut in enumerate(stream.shortcuts):
        made = shortcuts[cut.before, cut.after]
        name = f"slice_shortcut_{place}"
        put(program.graph_module, name, made)
        program.inserted[name], program.made_by[name] = REASON, BY
        with graph.inserting_before(nodes[cut.add]):
            new = graph.create_node("call_module", name, (nodes[cut.operand],), name=name)
        new.meta = dict(nodes[cut.operand].meta)
        nodes[cut.add].replace_input_with(nodes[cut.operand], new)
    for name in stream.views:
        sizes = list(nodes[name].args[1])  # type: ignore[arg-type]  # of a view
        nodes[name].args = (nodes[name].args[0], [*sizes[:-1], width], *nodes[name].args[2:])
    program.__dict__.pop("nodes", None)
    program.narrow([*stream.values, *(f"slice_shortcut_{i}" for i in range(len(stream.shortcuts)))], width)
    program.settle()


def _embedding(program: Program, stream: Stream, module: str, made: LinearMap) -> None:
    """Let a map stand where a table is read that something else reads too; from then on it is a site."""
    node = program.nodes[stream.embeddings[module][0]]
    table = str(node.args[0].target)  # type: ignore[union-attr]  # a node
    ids = node.args[1]
    assert isinstance(ids, fx.Node), "an embedding reads indices"
    site = next(
        site for site in program.sites.values() if program.names.canonical[site.weight_name] == program.names.canonical[table]
    )
    use = Use(module, node.name, ids.name)
    program.sites[module] = replace(
        site, fqn=module, weight_name=table, shape=(made.out_features, made.in_features), layout=Indices(None),
        type_name="Embedding", uses=(use,), tied=(), has_module=True,
    )  # fmt: skip
    program.maps[module], program.made_by[module] = made, BY
    _call(program, node, module, ids, made)


def _norm(program: Program, fqn: str, reads: str, gives: str, made: RmsNorm) -> None:
    node, read = program.nodes[gives], program.nodes[reads]
    for part in inside_norm(node, read):
        for user in list(part.users):
            if not user.users and user.op == "call_function" and "assert" in str(user.target):
                program.graph_module.graph.erase_node(user)
    _call(program, node, fqn, read, made)
    program.modules[fqn], program.made_by[fqn] = made, BY


def _call(program: Program, node: fx.Node, name: str, read: fx.Node, made: nn.Module) -> None:
    """Turn a node into the call of a module on one value, and put the module there."""
    graph = program.graph_module.graph
    with graph.inserting_before(node):
        new = graph.create_node("call_module", name, (read,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_unused(graph, node)
    new.name = node.name
    put(program.graph_module, name, made)
    program.__dict__.pop("nodes", None)
