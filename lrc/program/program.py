"""A captured program: one FX graph, its sites, and the maps that stand at them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrc.errors import SiteError, UsageError
from lrc.maps import LinearMap, frozen_base, looked_up
from lrc.maps.recurrence import Recurrence
from lrc.program.adapted import Adapted
from lrc.program.edits import put, raise_uses
from lrc.program.find import consumers, find_products
from lrc.program.inputs import Inputs
from lrc.program.late import LateGraphModule, compiled, copied
from lrc.program.loops import write_out
from lrc.program.recurrences import Recurrent, find_recurrent
from lrc.program.sites import Names, Site, find_sites
from lrc.program.stored import named_tensors, standing, stored_size, stored_tensors


@dataclass(frozen=True)
class Calling:
    """How the captured module is called, and what it returns.

    positional: the names of the inputs that positional arguments stand for, in order. keyword: those that an argument by
    name stands for, where it is no single tensor. out_spec: the tree of the outputs; fixed: its leaves that are no tensors,
    by place. baked: values of arguments that are no tensors, as they were at capture.
    """

    positional: tuple[str, ...] = ()
    keyword: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    fixed: Mapping[int, Any] = field(default_factory=dict)
    baked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a program comes from.

    model: the user's module, for `graft`; task: as transformers names them; folder: a Hugging Face folder; name: for people.
    """

    model: nn.Module | None = None
    task: str | None = None
    folder: Any = None
    name: str = "model"


@dataclass
class Program:
    """A captured graph with named tensor inputs and a mapping of named tensors as output.

    graph_module: the graph; inputs: its examples and dynamic sizes; names: the stored tensors in model order; maps: what
    stands at the raised sites now, by site; made_by: the pass that put it there. idle: modules of the captured model whose
    work a site has taken over: an identity stands for them. modules: what else passes put in the place of a module of the
    user's (a norm), by its name. inserted: names of modules that have no place there, with the reason. attributes: numbers
    that the user's modules keep and that are others now, by module and name. adapters: what is remembered of the adapters
    among the maps; frozen: nothing but adapters is trained; raised: the sites whose nodes are calls; changed: names of stored
    tensors outside of maps that passes (training, measured statistics) gave other values than the captured module's.
    recurrent: the operators of recurrent layers, by their nodes, written out or not.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    names: Names
    calling: Calling = field(default_factory=Calling)
    origin: Origin = field(default_factory=Origin)
    maps: dict[str, LinearMap] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    modules: dict[str, nn.Module] = field(default_factory=dict)
    inserted: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    adapters: dict[str, Adapted] = field(default_factory=dict)
    frozen: bool = False
    changed: frozenset[str] = frozenset()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    raised: set[str] = field(default_factory=set)
    recurrent: dict[str, Recurrent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.originals:
            self.originals = stored_tensors(self.graph_module)
            graph = self.graph_module.graph
            self.recurrent = find_recurrent(graph, self.originals)
            self.sites = find_sites(self, graph, self.originals, self.names, self.recurrent)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the graph on the inputs, by name or as the captured module takes them; return tensors by name."""
        named = self.bind(args, kwargs)
        result: dict[str, Tensor] = self.graph_module(**self.inputs.fill(named))
        return result

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by the names of the graph's inputs.

        Raises UsageError for more than the module takes, and for a value that is no tensor and not what the graph was made for.
        """
        positional = self.calling.positional or tuple(self.inputs.examples)
        flat = pytree.tree_leaves(args)
        if len(flat) > len(positional):
            raise UsageError("inputs", expected=f"at most {len(positional)} by position", got=str(len(flat)))
        named = dict(zip(positional, flat, strict=False))
        for name, value in kwargs.items():
            named |= zip(self.calling.keyword.get(name, (name,)), pytree.tree_leaves(value), strict=False)
        for name, value in self.calling.baked.items():
            asked = named.get(name)
            if asked is not None and value is not None and not isinstance(asked, Tensor) and asked != value:
                raise UsageError(
                    f"inputs.{name}", expected=f"{value!r}, which the graph was captured for", got=repr(asked),
                    hint="Capture the model again with this value among its example inputs",
                )  # fmt: skip
        return named

    @property
    def task(self) -> str | None:
        """The task, as transformers names them, or None."""
        return self.origin.task

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of the graph by name."""
        return {node.name: node for node in self.graph_module.graph.nodes}

    def position(self, fqn: str) -> int:
        """Return the place of a site's first use in the graph."""
        order = {name: i for i, name in enumerate(self.nodes)}
        return min(order[use.node] for use in self.site(fqn).uses)

    def site(self, fqn: str) -> Site:
        """Return a site. Raises SiteError when the program has none of this name."""
        if fqn not in self.sites:
            raise SiteError(fqn, message="the captured graph has no site of this name", hint="`lrc inspect` lists them")
        return self.sites[fqn]

    def map_of(self, fqn: str) -> LinearMap:
        """Return the map that stands at a site now; a site that no pass has touched has its dense map."""
        return self.maps.get(fqn) or self.site(fqn).original(self.originals)

    def replace(self, fqn: str, made: LinearMap, by: str = "", *, settle: bool = True, resize: bool = False) -> None:
        """Put a map at a site: at every use, with that use's own bias. The first time, the ATen nodes become calls.

        settle: check the graph and compile it again, which many replacements in a row need only once (`settle()`). resize: the
        map may have another shape, which is that of the site from then on; that its neighbours fit is the caller's matter.
        Raises SiteError for a map of another shape.
        """
        site, shape = self.site(fqn), (made.out_features, made.in_features)
        if shape != site.shape and not resize:
            raise SiteError(fqn, expected=f"a map of shape {site.shape}", got=repr(made))
        self.raise_sites([fqn])
        self.maps[fqn], self.made_by[fqn] = made.eval(), by
        self.adapters.pop(fqn, None)
        first = site.uses[0].bias
        for use in site.uses:
            if use.layout is not None:
                put(self.graph_module, use.module, self._table(site, made))
                continue
            own = made if use.bias == first else made.with_bias(self._own_bias(made, first, use.bias))
            if own is not made and own.bias is not None:
                own.bias.requires_grad_(not self.frozen)
            put(self.graph_module, use.module, own if use.cell is None else Recurrence(own, use.cell))
        if shape != site.shape:
            self.sites[fqn] = replace(site, shape=shape)
        if settle:
            self.settle()

    def raise_sites(self, fqns: Sequence[str]) -> None:
        """Turn the ATen nodes of sites that are none yet into calls; the caller puts a map at each (`replace`) at once.

        `replace` does it by itself: many sites together are faster.
        """
        write_out(self, fqns)
        uses = [use for fqn in fqns if fqn not in self.maps and fqn not in self.raised for use in self.site(fqn).uses]
        if uses:
            taken = {use.module for raised in {*self.maps, *self.raised} for use in self.site(raised).uses}
            raise_uses(self.graph_module, uses, taken, self.names.ties)
            self.__dict__.pop("nodes", None)
        self.raised.update(fqns)

    def join(self, fqn: str) -> None:
        """Let one map stand for a head and for the embeddings that share its weight. Numbers stay; doing so twice is once."""
        site = self.site(fqn)
        if not site.joint:
            self.sites[fqn] = site.shared()

    def _table(self, site: Site, made: LinearMap) -> LinearMap:
        try:
            return looked_up(made)
        except TypeError as error:
            raise SiteError(site.fqn, message=f"an embedding shares the weight, and {error}", hint="Untie it first") from error

    def narrow(self, nodes: Iterable[str], features: int) -> None:
        """Say that values have `features` in their last dimension now, as maps of another shape have made it."""
        for name in nodes:
            meta = self.nodes[name].meta
            if isinstance(meta.get("val"), Tensor):
                meta["val"] = meta["val"][..., :features]

    def freeze(self) -> None:
        """Train nothing any more but the adapters. The captured module goes on training its own parameters."""
        for fqn, made in list(self.maps.items()):
            if fqn not in self.adapters:
                twin = frozen_base(made)
                twin.bias = None if made.bias is None else nn.Parameter(made.bias.detach(), requires_grad=False)
                self.replace(fqn, twin, self.made_by.get(fqn, ""), settle=False)
        mapped = {id(p) for fqn in self.maps for made in self.placed(fqn).values() for p in made.parameters()}
        twins: dict[int, nn.Parameter] = {}
        for module in self.graph_module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in mapped:
                    twin_of = twins.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                    module._parameters[name] = twin_of
        self.frozen = True

    def settle(self) -> None:
        """Check the graph after replacements, and compile it again."""
        self.graph_module.graph.lint()
        self.graph_module.recompile()

    def placed(self, fqn: str) -> dict[str, LinearMap]:
        """Return what stands at each module name of a raised site: one map, with the own bias of each use."""
        return {use.module: standing(self.graph_module, use.module) for use in self.site(fqn).uses}

    def _own_bias(self, made: LinearMap, first: str | None, own: str | None) -> nn.Parameter | None:
        """Return this use's bias, moved by as much as the map's bias moved from that of the first use."""
        parts = [0.0 if own is None else self.originals[own].detach().double()]
        if made.bias is not None:
            before = 0.0 if first is None else self.originals[first].detach().double()
            parts.append(made.bias.detach().double() - before)
        total = sum(parts[1:], parts[0])
        return nn.Parameter(total.to(made.dtype)) if isinstance(total, Tensor) else None

    def unsupported(self) -> list[str]:
        """Return the operations that read stored matrices of two or more dimensions and are no sites, by plain names."""
        graph = self.graph_module.graph
        named = dict(named_tensors(self.graph_module, remove_duplicate=False))
        found = consumers(graph, find_products(graph, named), named, self.recurrent)
        return sorted({name for names in found.values() for name in names})

    def clone(self) -> "Program":
        """Return a program with its own graph that shares every tensor with this one."""
        twin = LateGraphModule(self.graph_module, copied(self.graph_module.graph))
        made = replace(
            self, graph_module=twin, maps=dict(self.maps), made_by=dict(self.made_by), modules=dict(self.modules),
            inserted=dict(self.inserted), attributes={name: dict(own) for name, own in self.attributes.items()},
            adapters=dict(self.adapters), raised=set(self.raised), recurrent=dict(self.recurrent),
        )  # fmt: skip
        made.sites = {fqn: replace(site, program=made) for fqn, site in self.sites.items()}
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the graph reads, by name, each storage once."""
        return stored_tensors(self.graph_module)

    def size(self) -> tuple[int, int]:
        """Return the program's stored numbers, packed ones too, and all its stored bytes."""
        return stored_size(self.graph_module)

    def digest(self) -> str:
        """Return the hash of the graph and of every number in it, 64 hexadecimal digits."""
        sha = hashlib.sha256(str(self).encode())
        for name, tensor in self.tensors().items():
            data = tensor.new_empty(tensor.shape, device="cpu").copy_(tensor.detach())  # a single number may have any stride
            sha.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
            if data.numel():
                sha.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # a buffer
        return sha.hexdigest()

    def export(self, *, static: bool = False) -> torch.export.ExportedProgram:
        """Return the graph as an exported program with flat, named inputs and a mapping as output.

        static: for the shapes of the examples alone.
        """
        shapes = None if static else self.inputs.dims()
        compiled(self.graph_module)
        with torch.no_grad():
            return torch.export.export(
                self.graph_module, (), kwargs=dict(self.inputs.examples), dynamic_shapes=shapes, strict=False
            )

    def module(self) -> nn.Module:
        """Return a module that takes and returns what the captured one did."""
        compiled(self.graph_module)
        from lrc.program.as_module import Callable_

        return Callable_(self)

    def __str__(self) -> str:
        from lrc.program.text import program_text

        return program_text(self)
