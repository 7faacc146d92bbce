"""The residual stream of a program: the values that are added up from the embedding on, and everything that touches them.

    %x: embedding;  %h = norm(%x);  %y = writer(f(reader(%h)));  %x' = add(%x, %y);  …

It is found by what the graph computes: normalised values that linears read, and from there along additions. Anything else
that touches the stream is a reason why its directions may not be changed.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.errors import UsageError
from lrc.program.find import plain_name
from lrc.program.products import stored
from lrc.program.program import Program

aten = torch.ops.aten
ADDS = {aten.add.Tensor, aten.add_.Tensor, operator.add}
SILENT = {aten._assert_tensor_metadata.default, aten.sym_size.int}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
SAME = CASTS | {
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.select.int, aten.expand.default,
}  # fmt: skip
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class Norm:
    """A normalisation of the stream. fqn: its module; reads, gives: names of nodes; centers: a mean is taken off first."""

    fqn: str
    reads: str
    gives: str
    weight: str | None
    bias: str | None
    eps: float
    centers: bool


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
        self.norms = {self._node(norm.gives): (norm, reads) for norm, reads in seeds}
        self.inner = {node for norm, reads in seeds for node in inside_norm(self._node(norm.gives), reads)}
        waiting = [reads for _, reads in seeds]
        while waiting:
            node = waiting.pop()
            if node not in self.stream:
                self.stream[node] = None
                waiting += [*self._made_of(node), *self._used_by(node)]
        for gives, (norm, reads) in self.norms.items():
            if reads in self.stream:
                self._follow(gives, norm)
        return self._in_bases()

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
        if node.target in SAME:
            return [node.args[0]]  # type: ignore[list-item]  # a node
        if node.target in SCALES and not isinstance(node.args[1], fx.Node):
            return [node.args[0]]  # type: ignore[list-item]  # a node
        raise refusal(f"{node.name} ({plain_name(node.target)}) gives a value of the stream")

    def _used_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the values of the stream that are made of a value."""
        found = []
        for user in node.users:
            if user in self.inner or user in self.stream or user.target in SILENT or self._reads_norm(user, node):
                continue
            adds = user.target in ADDS and not user.kwargs
            scales = user.target in SCALES and not isinstance(user.args[1], fx.Node)
            if adds or scales or (user.target in SAME and self._keeps_features(user)):
                found.append(user)
                continue
            raise refusal(f"{user.name} ({self._said(user)}) reads the stream without a norm before it")
        return found

    def _reads_norm(self, user: fx.Node, node: fx.Node) -> bool:
        return any(gives is user and reads is node for gives, (_, reads) in self.norms.items())

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
                    raise refusal(
                        f"what {norm.fqn} gives is added to the stream again: norms stand behind the blocks (post-norm), and "
                        "no change of basis passes them"
                    )
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


def match_norm(node: fx.Node) -> tuple[Norm, fx.Node] | None:
    """Return the norm that a node gives and the node that it reads, or None: LayerNorm, RMSNorm, or the latter spelled out."""
    if node.target == aten.layer_norm.default:
        return _fused(node, centers=True)
    if node.target == aten.rms_norm.default:
        return _fused(node, centers=False)
    return _spelled_out(node)


def _fused(node: fx.Node, *, centers: bool) -> tuple[Norm, fx.Node] | None:
    arguments = [*node.args, None, None, None][:5]
    x, shape, weight, bias, eps = arguments if centers else (*arguments[:3], None, arguments[3])
    sources = [None if given is None else stored(given) for given in (weight, bias)]
    missing = any(given is not None and source is None for given, source in zip((weight, bias), sources, strict=True))
    if not isinstance(x, fx.Node) or not isinstance(shape, list | tuple) or len(shape) != 1 or missing:
        return None
    if eps is None:
        eps = 1e-5 if centers else torch.finfo(x.meta["val"].dtype).eps
    names = [None if source is None else source[0] for source in sources]
    owner = next((name.rpartition(".")[0] for name in names if name is not None), module_of(node))
    return Norm(owner, x.name, node.name, names[0], names[1], float(eps), centers), x  # type: ignore[arg-type]  # a number


def _spelled_out(node: fx.Node) -> tuple[Norm, fx.Node] | None:
    """Match weight * cast(x * rsqrt(mean(x²) + eps))."""
    if node.target != aten.mul.Tensor:
        return None
    for weight, scaled in (node.args, node.args[::-1]):
        source = stored(weight)
        if source is None or not isinstance(scaled, fx.Node):
            continue
        normalised = without_casts(scaled)
        for x, root in (normalised.args, normalised.args[::-1]) if normalised.target == aten.mul.Tensor else ():
            if not isinstance(x, fx.Node) or not isinstance(root, fx.Node) or root.target != aten.rsqrt.default:
                continue
            total = root.args[0]
            if not isinstance(total, fx.Node) or total.target not in ADDS or not isinstance(total.args[1], float | int):
                continue
            mean = total.args[0]
            if not isinstance(mean, fx.Node) or mean.target != aten.mean.dim or list(mean.args[1]) != [-1]:  # type: ignore[call-overload]  # dims
                continue
            squares = mean.args[0]
            if not isinstance(squares, fx.Node) or squares.target != aten.pow.Tensor_Scalar or squares.args != (x, 2):
                continue
            read = x.args[0] if x.target in CASTS and _dtype(x.args[0]) != _dtype(x) else x
            owner = source[0].rpartition(".")[0]
            return Norm(owner, read.name, node.name, source[0], None, float(total.args[1]), False), read  # type: ignore[union-attr]  # a node
    return None


def inside_norm(gives: fx.Node, reads: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes that a norm is made of, the value that it reads left out."""
    waiting, found = [gives], {}
    while waiting:
        node = waiting.pop()
        if node is not reads and node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return found


def without_casts(node: fx.Node) -> fx.Node:
    """Return what a node is a cast of."""
    while node.target in CASTS:
        node = node.args[0]  # type: ignore[assignment]  # a node
    return node


def module_of(node: fx.Node) -> str:
    """Return the name of the module whose `forward` made a node, "" where it is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].").strip(".") if stack else ""


def refusal(why: str) -> UsageError:
    """Return the error of a program whose residual stream may not be changed."""
    return UsageError("slice", message=f"the residual stream cannot be sliced: {why}", hint="Use `factorize` for this model")


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _last(value: Tensor) -> int:
    return int(value.shape[-1])


def _names_width(node: fx.Node, width: int) -> bool:
    sizes = node.args[1] if len(node.args) > 1 else None
    return isinstance(sizes, list | tuple) and len(sizes) > 0 and sizes[-1] == width
