"""The residual stream of a program: the values that are added up from the embedding on, and everything that touches them.

    %x: embedding;  %h = norm(%x);  %y = writer(f(reader(%h)));  %x' = add(%x, %y);  …

It is found by what the graph computes: normalised values that linears read, and from there along additions. Anything else
that touches the stream is a reason why its directions may not be changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lrc.errors import UsageError
from lrc.program.find import plain_name
from lrc.program.norms import ADDS, CASTS, Norm, inside_norm, match_norm, module_of
from lrc.program.products import stored
from lrc.program.program import Program

aten = torch.ops.aten
SILENT = {aten._assert_tensor_metadata.default, aten.sym_size.int}
SAME = CASTS | {
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.select.int, aten.expand.default,
}  # fmt: skip
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class Shortcut:
    """An operand of an addition of the stream that stands in another basis than the sum. Names of nodes, and two bases."""

    add: str
    operand: str
    before: int
    after: int


@dataclass(frozen=True)
class Stream:
    """A residual stream of `width` features.

    norms: in graph order. bases: which values may have directions of their own, as the places of the norms that read each.
    readers, writers: of every site, its basis; a reader's norm is `norms[norm_of[fqn]]`. embeddings: nodes of lookups into a
    table that something else reads too, by the name of their module, with their bases. shortcuts: where bases meet. values:
    names of all nodes that have `width` features in the stream. views: those whose sizes name the width.
    """

    width: int
    norms: tuple[Norm, ...]
    bases: tuple[tuple[int, ...], ...]
    readers: Mapping[str, int]
    norm_of: Mapping[str, int]
    writers: Mapping[str, int]
    embeddings: Mapping[str, tuple[str, int]]
    shortcuts: tuple[Shortcut, ...]
    values: tuple[str, ...]
    views: tuple[str, ...]

    def in_one_basis(self) -> "Stream":
        """Return the same stream with one basis for all of it, where no bases meet."""
        return replace(
            self,
            bases=(tuple(range(len(self.norms))),),
            readers=dict.fromkeys(self.readers, 0),
            writers=dict.fromkeys(self.writers, 0),
            embeddings={module: (node, 0) for module, (node, _) in self.embeddings.items()},
            shortcuts=(),
        )


def find_stream(program: Program) -> Stream:
    """Return the residual stream of a program, which is not changed. Raises UsageError that says why there is none."""
    twin = program.clone()
    for fqn, site in twin.sites.items():
        if fqn not in twin.maps and site.kind in ("linear", "embedding"):
            twin.replace(fqn, site.map, settle=False)
    return _Search(twin).found()


class _Search:
    """One search: from the norms that linears read, along every addition."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph_module.graph
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.site_of = {use.node: site for site in program.sites.values() for use in site.uses}
        self.norms: dict[fx.Node, tuple[Norm, fx.Node]] = {}  # by the node that gives, with the node that it reads
        self.inside: dict[fx.Node, tuple[fx.Node, Norm, fx.Node]] = {}  # what any norm is made of
        self.stream: dict[fx.Node, None] = {}
        self.after: dict[fx.Node, fx.Node] = {}  # a value that is handed on as it is, after a norm
        self.readers: dict[str, fx.Node] = {}
        self.writers: dict[str, fx.Node] = {}
        self.embeddings: dict[str, fx.Node] = {}

    def found(self) -> Stream:
        """Return the stream."""
        norms = [found for node in self.graph.nodes if (found := match_norm(node)) is not None]
        seeds = [(norm, reads) for norm, reads in norms if self._read_by_linears(self._node(norm.gives))]
        if not seeds:
            raise refusal("no linear layer reads a normalised value: there is no residual stream with norms before its blocks")
        for norm, reads in norms:
            gives = self._node(norm.gives)
            self.inside |= dict.fromkeys(inside_norm(gives, reads), (gives, norm, reads))
        self.norms = {self._node(norm.gives): (norm, reads) for norm, reads in seeds}
        waiting = [reads for _, reads in seeds]
        while waiting:
            node = waiting.pop()
            if node not in self.stream:
                self.stream[node] = None
                waiting += [*self._made_of(node), *self._used_by(node)]
        for gives, (norm, reads) in self.norms.items():
            self._check_module(norm, set(inside_norm(gives, reads)))
            self._follow(gives, norm)
        return self._in_bases()

    def _check_module(self, norm: Norm, inside: set[fx.Node]) -> None:
        """Raise UsageError where a norm is not all that its module does: nothing may take that module's place."""
        own = {norm.weight, norm.bias}
        more = [name for name in self.program.tensors() if name.startswith(f"{norm.fqn}.") and name not in own]
        more += [
            node.name
            for node in self.graph.nodes
            if node.op == "call_function"
            and node not in inside
            and node.target not in SILENT | CASTS
            and module_of(node) == norm.fqn
        ]
        if more or not norm.fqn:
            raise refusal(f"the norm {norm.gives} is no module of its own: {norm.fqn or 'the model'} does more")

    def _node(self, name: str) -> fx.Node:
        return self.program.nodes[name]

    def _read_by_linears(self, gives: fx.Node) -> bool:
        waiting, seen = list(gives.users), set()
        while waiting:
            user = waiting.pop()
            site = self.site_of.get(user.name)
            if site is not None and site.kind == "linear" and user.op == "call_module":
                return True
            if user.target in SAME and user not in seen:
                seen.add(user)
                waiting += user.users
        return False

    def _made_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the values of the stream that a value is made of; a site that gives it is a writer."""
        site = self.site_of.get(node.name)
        if site is not None and node.op == "call_module":
            if site.kind == "conv" or len(site.uses) > 1:
                raise refusal(
                    f"{site.fqn} writes into the stream and is {'a convolution' if len(site.uses) == 1 else 'shared'}"
                )
            self.writers[site.fqn] = node
            return []
        if node.target == aten.embedding.default:
            self.embeddings[module_of(node)] = node
            return []
        if node.target in ADDS and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args):
            terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if all(stored(term) is None for term in terms):
                return terms
        if node in self.inside and self.inside[node][0] is node:
            raise behind(self.inside[node][1])
        if node.target in SAME:
            return [node.args[0]]  # type: ignore[list-item]  # a node
        if node.target in SCALES and not isinstance(node.args[1], fx.Node):
            return [node.args[0]]  # type: ignore[list-item]  # a node
        raise refusal(f"{node.name} ({plain_name(node.target)}) gives a value of the stream")

    def _used_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the values of the stream that are made of a value."""
        found = []
        for user in node.users:
            if user in self.inside and self.inside[user][2] is node:
                gives, norm, reads = self.inside[user]
                self.norms[gives] = (norm, reads)
                continue
            if user in self.stream or user.target in SILENT:
                continue
            adds = user.target in ADDS and not user.kwargs
            scales = user.target in SCALES and not isinstance(user.args[1], fx.Node)
            if adds or scales or (user.target in SAME and self._keeps_features(user)):
                found.append(user)
                continue
            raise refusal(f"{user.name} ({self._said(user)}) reads the stream without a norm before it")
        return found

    def _keeps_features(self, node: fx.Node) -> bool:
        read, given = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]  # a node
        return isinstance(read, Tensor) and isinstance(given, Tensor) and _last(read) == _last(given)

    def _said(self, node: fx.Node) -> str:
        site = self.site_of.get(node.name)
        if site is not None:
            return site.fqn
        return "the model's output" if node.op == "output" else plain_name(node.target)

    def _follow(self, gives: fx.Node, norm: Norm) -> None:
        """Find the linears that read a norm; nothing else may."""
        waiting = [gives]
        while waiting:
            node = waiting.pop()
            self.after[node] = gives
            for user in node.users:
                site = self.site_of.get(user.name)
                if site is not None and user.op == "call_module" and site.kind == "linear":
                    if len(site.uses) > 1:
                        raise refusal(f"{site.fqn} reads the stream in more than one place")
                    self.readers[site.fqn] = gives
                elif user.target in SAME and self._keeps_features(user):
                    waiting.append(user)
                elif user in self.stream:
                    raise behind(norm)
                elif user.target not in SILENT:
                    raise refusal(f"what {norm.fqn} gives is read by {self._said(user)}, which is no linear layer")

    def _in_bases(self) -> Stream:
        """Give every value that a norm reads a basis of its own, and all other values that of what they are added to."""
        norms = sorted(self.norms.items(), key=lambda item: self.order[item[0]])
        basis: dict[fx.Node, int] = {}
        groups: list[list[int]] = []
        for place, (_, (_, reads)) in enumerate(norms):
            root = self._root(reads)
            if root not in basis:
                basis[root] = len(groups)
                groups.append([])
            groups[basis[root]].append(place)
        for node in sorted(self.stream, key=lambda node: -self.order[node]):
            root = self._root(node)
            if root not in basis:
                users = [self._root(u) for n in self.stream if self._root(n) is root for u in n.users if u in self.stream]
                known = [basis[u] for u in users if u is not root and u in basis]
                if not known:
                    raise refusal(f"{node.name} is added up and never read")
                basis[root] = known[0]
        shortcuts = []
        for node in sorted(self.stream, key=lambda node: self.order[node]):
            for read in node.all_input_nodes if node.target in ADDS else ():
                before, after = basis[self._root(read)], basis[self._root(node)]
                if before != after:
                    shortcuts.append(Shortcut(node.name, read.name, before, after))
        widths = {_last(node.meta["val"]) for node in self.stream}
        if len(widths) != 1:
            raise refusal(f"there are streams of several widths, {sorted(widths)}")
        place_of = {gives: place for place, (gives, _) in enumerate(norms)}
        (width,) = widths
        values = [node for node in self.graph.nodes if node in self.stream or node in self.after]
        return Stream(
            width,
            tuple(norm for _, (norm, _) in norms),
            tuple(map(tuple, groups)),
            {fqn: basis[self._root(self.norms[gives][1])] for fqn, gives in self.readers.items()},
            {fqn: place_of[gives] for fqn, gives in self.readers.items()},
            {fqn: basis[self._root(node)] for fqn, node in self.writers.items()},
            {module: (node.name, basis[self._root(node)]) for module, node in self.embeddings.items()},
            tuple(shortcuts),
            tuple(node.name for node in values),
            tuple(node.name for node in values if node.target in SAME - CASTS and _names_width(node, width)),
        )

    def _root(self, node: fx.Node) -> fx.Node:
        """Return the first of the values that are the same but for a scale, a type or a row."""
        while node in self.stream and node.target in SAME | SCALES:
            node = node.args[0]  # type: ignore[assignment]  # a node
        return node


def behind(norm: Norm) -> UsageError:
    """Return the error of a norm whose outputs are added up again."""
    return refusal(
        f"what {norm.fqn} gives is added to the stream again: norms stand behind the blocks (post-norm), and no change of "
        "basis passes them"
    )


def refusal(why: str) -> UsageError:
    """Return the error of a program whose residual stream may not be changed."""
    return UsageError("slice", message=f"the residual stream cannot be sliced: {why}", hint="Use `factorize` for this model")


def _last(value: Tensor) -> int:
    return int(value.shape[-1])


def _names_width(node: fx.Node, width: int) -> bool:
    sizes = node.args[1] if len(node.args) > 1 else None
    return isinstance(sizes, list | tuple) and len(sizes) > 0 and sizes[-1] == width
