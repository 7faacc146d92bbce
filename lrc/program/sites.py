"""Sites: the weights of a program at their places, found by storage and shape, never by a table of model names."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from lrc.maps import JointRows, Layout, LinearMap, Rows
from lrc.maps.recurrence import Cell
from lrc.program.find import consumers, find_products, inside, shared_lookups
from lrc.program.products import Product
from lrc.program.recurrences import TYPES as RECURRENT
from lrc.program.recurrences import Recurrent

if TYPE_CHECKING:
    from lrc.program.program import Program

TYPES = {
    "linear": "Linear",
    "conv": "Conv",
    "embedding": "Embedding",
    "embedding_bag": "EmbeddingBag",
    "experts": "Experts",
}  # of a site whose module nobody named


@dataclass(frozen=True)
class Use:
    """One place where a site's weight is used.

    module: the name under which the map stands in the graph and in the user's module; node: the node that gives the
    output; input: the node that is read; bias: the name of this use's own bias, or None; context: the other nodes that the
    map is given, by the names of its arguments. layout: how it reads the weight, where not as its site does. cell: the loop
    over time that the weight is in; `node` is then the loop, which reads `input`, and what the weight itself reads and gives
    at all times are the nodes `inside`.
    """

    module: str
    node: str
    input: str
    bias: str | None = None
    context: tuple[tuple[str, str], ...] = ()
    layout: Layout | None = None
    cell: Cell | None = None
    inside: tuple[str, str] | None = None

    @property
    def reads(self) -> str:
        """The node whose value the weight multiplies."""
        return self.inside[0] if self.inside else self.input

    @property
    def gives(self) -> str:
        """The node with the shape and the gradient of what the weight gives."""
        return self.inside[1] if self.inside else self.node


@dataclass(frozen=True)
class Site:
    """A weight and everything that uses it.

    fqn: the fully qualified name, that of the first use in model order. weight_name: the stored tensor. layout: how that
    tensor acts as a matrix of `shape`, (out_features, in_features). type_name: class of the module that owns it. tied: what
    else reads the same storage (`embedding`). has_module: False where the weight is a bare parameter of a larger module.
    lookups: the embeddings among `tied`, where there is nothing else, so that one map may stand for all of them (`shared`).
    """

    program: "Program"
    fqn: str
    weight_name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    type_name: str
    uses: tuple[Use, ...]
    tied: tuple[str, ...] = ()
    has_module: bool = True
    lookups: tuple[Use, ...] = ()

    @property
    def joint(self) -> bool:
        """Whether one map stands for a head and for the embeddings that it shares its weight with."""
        return any(use.layout is not None for use in self.uses)

    def shared(self) -> "Site":
        """Return the site with its lookups among its uses. Raises ValueError where it has none."""
        if not self.lookups:
            raise ValueError(f"{self.fqn} shares no table")
        return replace(self, uses=self.uses + self.lookups, lookups=(), tied=(), layout=JointRows())

    @property
    def looped(self) -> bool:
        """Whether the weight multiplies the hidden states of a recurrent layer, step by step."""
        return any(use.cell is not None for use in self.uses)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def full_rank(self) -> int:
        """The largest rank of a product: of every group, where there are several."""
        return min(self.out_features // self.layout.groups, self.in_features)

    @property
    def map(self) -> LinearMap:
        """The map that stands there now."""
        return self.program.map_of(self.fqn)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the first use."""
        made = self.program.maps.get(self.fqn)
        if made is not None:
            return made.bias
        name = self.uses[0].bias
        return None if name is None else self.program.originals[name].detach()

    @property
    def kind(self) -> str:
        """What the weight is: `linear`, `conv`, `embedding`, `embedding_bag` or `experts`."""
        return self.layout.kind

    @property
    def transposed(self) -> bool:
        """Whether a linear is stored as (in_features, out_features), as in GPT-2."""
        return self.layout == Rows(transposed=True)

    def original(self, tensors: Mapping[str, Tensor], *, bias: bool = True) -> LinearMap:
        """Return the map as the model stores it, or without its bias; it shares its memory, and is frozen."""
        name = self.uses[0].bias if bias else None
        made = self.layout.original(tensors[self.weight_name].detach(), None if name is None else tensors[name].detach())
        made.requires_grad_(False)
        return made


@dataclass(frozen=True)
class Names:
    """The names of stored tensors in model order: every alias of a storage, and the first one."""

    canonical: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Names":
        """Group names by storage, place and shape."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, tensor in tensors.items():
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            groups.setdefault((name,) if tensor.numel() == 0 else place, []).append(name)
        first = {name: names[0] for names in groups.values() for name in names}
        return cls({name: first[name] for name in tensors}, {names[0]: tuple(names) for names in groups.values()})

    def ties(self, name: str) -> tuple[str, ...]:
        """Return every name of the tensor that has this one; none for a tensor that the model does not know."""
        return self.aliases.get(self.canonical.get(name, name), ())


def find_sites(
    program: "Program", graph: fx.Graph, tensors: Mapping[str, Tensor], names: Names, recurrent: Mapping[str, Recurrent]
) -> dict[str, Site]:
    """Return the sites of a graph, by name, in model order. recurrent: its recurrent operators, by their nodes."""
    products = find_products(graph, tensors)
    others = consumers(graph, products, tensors, recurrent)
    tables = shared_lookups(graph, products, tensors)
    busy = _modules_that_do_more(graph, [*products, *(product for found in tables.values() for product in found)])
    grouped: dict[str, list[Product]] = {}
    for product in products:
        grouped.setdefault(product.weight, []).append(product)
    order = {name: i for i, name in enumerate(names.canonical)}
    sites = []
    for weight, group in grouped.items():
        made = _site(program, weight, group, names, tensors, order, others.get(weight, []), busy)
        sites.append(_with_lookups(made, tables.get(weight, []), names, others.get(weight, []), busy))
    sites += _recurrent_sites(program, recurrent.values(), names, tensors)
    sites.sort(key=lambda site: order.get(f"{site.fqn}.weight", order[site.weight_name]))
    return {site.fqn: site for site in sites}


def _site(
    program: "Program",
    weight: str,
    products: Sequence[Product],
    names: Names,
    tensors: Mapping[str, Tensor],
    order: Mapping[str, int],
    others: Sequence[str],
    busy: Set[str | None],
) -> Site:
    aliases = names.aliases[names.canonical[weight]]
    placed = [(_owner(product, aliases, busy), product) for product in products]
    placed.sort(key=lambda item: order.get(f"{item[0][0]}.weight", order[weight]))  # stable: graph order within one
    modules = _told_apart([(owner[0], product.bias) for owner, product in placed])
    uses = tuple(
        Use(module, product.node.name, product.reads.name, product.bias, _names(product.context))
        for module, (_, product) in zip(modules, placed, strict=True)
    )
    return Site(
        program,
        fqn=uses[0].module,
        weight_name=weight,
        shape=products[0].layout.shape(tuple(tensors[weight].shape)),
        dtype=tensors[weight].dtype,
        layout=products[0].layout,
        type_name=placed[0][0][1],
        uses=uses,
        tied=tuple(sorted(set(others))),
        has_module=all(owner[2] for owner, _ in placed),
    )


def _recurrent_sites(
    program: "Program", recurrent: Iterable[Recurrent], names: Names, tensors: Mapping[str, Tensor]
) -> list[Site]:
    """Return the weights of recurrent layers, of the inputs and of the hidden states; one site a weight."""
    uses: dict[str, list[Use]] = {}
    kinds: dict[str, str] = {}
    for part in (part for one in recurrent for part in one.directions):
        of_inputs = Use("", part.gates, part.reads, part.input_bias)
        inside = (part.read, part.tap)
        of_states = Use("", part.states, part.gates, part.hidden_bias, part.context(), cell=part.cell, inside=inside)
        for weight, use in ((part.input_weight, of_inputs), (part.hidden_weight, of_states)):
            uses.setdefault(weight, []).append(replace(use, module=names.aliases[names.canonical[weight]][0]))
            kinds[weight] = RECURRENT[part.cell.kind]
    return [
        Site(
            program, own[0].module, weight, (tensors[weight].shape[0], tensors[weight].shape[1]), tensors[weight].dtype,
            Rows(), kinds[weight], tuple(own), has_module=False,
        )
        for weight, own in uses.items()
    ]  # fmt: skip


def _with_lookups(site: Site, tables: Sequence[Product], names: Names, others: Sequence[str], busy: Set[str | None]) -> Site:
    """Return the site with the embeddings that share its weight, where nothing else reads it and each has a module."""
    owners = [_owner(product, names.aliases[names.canonical[site.weight_name]], busy) for product in tables]
    if len(tables) != len(others) or not all(owner[2] for owner in owners):
        return site
    uses = [
        Use(owner[0], product.node.name, product.reads.name, layout=product.layout)
        for owner, product in zip(owners, tables, strict=True)
    ]
    return replace(site, lookups=tuple(uses))


def _names(context: Mapping[str, fx.Node]) -> tuple[tuple[str, str], ...]:
    return tuple((name, node.name) for name, node in context.items())


def _told_apart(places: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a name for every (module, bias): the module's, numbered where uses of one name add different biases."""
    named: dict[tuple[str, str | None], str] = {}
    for module, bias in places:
        count = sum(known == module for known, _ in named)
        named.setdefault((module, bias), f"{module}_{count}" if count else module)
    return [named[place] for place in places]


def _owner(product: Product, aliases: Sequence[str], busy: Set[str | None]) -> tuple[str, str, bool]:
    """Return the module that a use belongs to, its class, and whether calling that module is the use and nothing else.

    Where the module that was running does not own the weight (a functional call on a parameter), or does more than this
    product, the weight's own place is the name.
    """
    if product.layout.kind == "experts":
        return aliases[0], TYPES["experts"], False
    running, kind = _running(product.node)
    own = f"{running}.weight"
    if running is not None and own in aliases:
        return (own, "Parameter", False) if running in busy else (running, kind, True)
    alias = aliases[0]
    if alias.endswith(".weight"):
        return alias.removesuffix(".weight"), TYPES[product.layout.kind], running is None
    return alias, "Parameter", False


def _running(node: fx.Node) -> tuple[str | None, str]:
    """Return the name and class of the module whose `forward` made a node, if known: the last entry of `nn_module_stack`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None, ""
    name, kind = stack[-1]
    return str(name).removeprefix("L['self'].").strip("."), str(kind).rsplit(".", 1)[-1]


def _modules_that_do_more(graph: fx.Graph, products: Sequence[Product]) -> set[str | None]:
    """Return the names of modules that compute anything beside such products."""
    ours = inside(products)
    values = (node for node in graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor))
    return {_running(node)[0] for node in values if node not in ours and node.users}
