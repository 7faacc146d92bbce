"""Sites: the weights of a program at their places, found by storage and shape, never by a table of model names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from lrc.maps import Dense, LinearMap
from lrc.program.linears import Linear, consumers, find_linears

if TYPE_CHECKING:
    from lrc.program.program import Program


@dataclass(frozen=True)
class Use:
    """One place where a site's weight is used.

    module: the name under which the map stands in the graph and in the user's module; node: the node that gives the
    output; input: the node that is read; bias: the name of this use's own bias, or None.
    """

    module: str
    node: str
    input: str
    bias: str | None = None


@dataclass(frozen=True)
class Site:
    """A weight and everything that uses it.

    fqn: the fully qualified name, that of the first use in model order. weight_name: the stored tensor. transposed: stored
    as (in_features, out_features), as in GPT-2. type_name: class of the module that owns it. tied: what else reads the
    same storage (`embedding`). has_module: False where the weight is a bare parameter of a larger module.
    """

    program: "Program"
    fqn: str
    weight_name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    type_name: str
    uses: tuple[Use, ...]
    tied: tuple[str, ...] = ()
    has_module: bool = True

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def map(self) -> LinearMap:
        """The map that stands there now."""
        return self.program.map_of(self.fqn)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the first use."""
        return self.map.bias

    def original(self, tensors: Mapping[str, Tensor]) -> Dense:
        """Return the dense map as the model stores it; it shares its memory, and is frozen."""
        weight = tensors[self.weight_name].detach()
        bias = self.uses[0].bias
        made = Dense(weight.T if self.transposed else weight, None if bias is None else tensors[bias].detach())
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
        canonical = {name: names[0] for names in groups.values() for name in names}
        return cls(canonical, {names[0]: tuple(names) for names in groups.values()})


def find_sites(program: "Program", graph: fx.Graph, tensors: Mapping[str, Tensor], names: Names) -> dict[str, Site]:
    """Return the linear sites of a graph, by name, in model order."""
    linears = find_linears(graph, tensors)
    others = consumers(graph, linears, tensors)
    grouped: dict[str, list[Linear]] = {}
    for linear in linears:
        grouped.setdefault(linear.weight, []).append(linear)
    order = {name: i for i, name in enumerate(names.canonical)}
    sites = [_site(program, weight, group, names, tensors, order, others.get(weight, [])) for weight, group in grouped.items()]
    sites.sort(key=lambda site: order.get(f"{site.fqn}.weight", order[site.weight_name]))
    return {site.fqn: site for site in sites}


def _site(
    program: "Program",
    weight: str,
    linears: Sequence[Linear],
    names: Names,
    tensors: Mapping[str, Tensor],
    order: Mapping[str, int],
    others: Sequence[str],
) -> Site:
    aliases = names.aliases[names.canonical[weight]]
    placed = [(_owner(linear, aliases), linear) for linear in linears]
    placed.sort(key=lambda item: order.get(f"{item[0][0]}.weight", order[weight]))  # stable: graph order within one
    uses = tuple(Use(owner[0], linear.node.name, linear.reads.name, linear.bias) for owner, linear in placed)
    transposed = linears[0].transposed
    rows, columns = tensors[weight].shape
    return Site(
        program,
        fqn=uses[0].module,
        weight_name=weight,
        shape=(columns, rows) if transposed else (rows, columns),
        dtype=tensors[weight].dtype,
        transposed=transposed,
        type_name=placed[0][0][1],
        uses=uses,
        tied=tuple(sorted(set(others))),
        has_module=placed[0][0][2],
    )


def _owner(linear: Linear, aliases: Sequence[str]) -> tuple[str, str, bool]:
    """Return the module that a use belongs to, its class, and whether the weight is the module's own `weight`.

    The last entry of `nn_module_stack` is the module that was running; where it does not own the weight (a functional call
    on a parameter), the parameter's own name is the place.
    """
    stack = list((linear.node.meta.get("nn_module_stack") or {}).values())
    running, kind = stack[-1] if stack else ("", "")
    running = running.removeprefix("L['self'].").strip(".")
    if f"{running}.weight" in aliases:
        return running, str(kind).rsplit(".", 1)[-1], True
    alias = aliases[0]
    if alias.endswith(".weight"):
        return alias.removesuffix(".weight"), "Linear", True
    return alias, "Parameter", False
