"""What an adapter method is, and how one is written.

A method is a function from one place to a map, `@adapter(Options)`: it composes what stands there, frozen, with small
trained maps. The pass `adapt` finds the sites, decides the ranks, has the factors initialised, and puts the map in place.
Found by entry points of the group `lrc.adapters`, ours and a stranger's.
"""

from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from lrc.initialisers import Initial, InitialiserOptions, Kaiming
from lrc.maps import Chain, Dropout, LinearMap, Scale, frozen_base
from lrc.program import Adapted, Site
from lrc.spec.base import Tagged
from lrc.spec.registry import ADAPTERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


class AdapterOptions(Tagged):
    """The options of a method.

    default_rank, default_alpha: where the spec names none. default_init: the initialiser where it names none, or None for a
    method that starts by itself and takes none. kinds: the sites that it knows; grouped: among them convolutions in groups.
    """

    default_rank: ClassVar[int] = 8
    default_alpha: ClassVar[float | None] = 16.0
    default_init: ClassVar[InitialiserOptions | None] = Kaiming()
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    grouped: ClassVar[bool] = False

    def rank_for(self, shape: tuple[int, int]) -> int:
        """Return the rank at a site of shape (out_features, in_features) where the spec names none."""
        return self.default_rank

    def scaling(self, rank: int, alpha: float | None) -> float:
        """Return the constant in front of the adapter's product; alpha: as the spec says, or `default_alpha`."""
        return 1.0 if alpha is None else alpha / rank

    def obstacle(self, site: Site, rank: int) -> str | None:
        """Return why the method cannot adapt a site at this rank, or None."""
        if site.kind not in self.kinds:
            return f"`method: {self.type}` knows no {site.kind}"
        return None if self.grouped else site.layout.obstacle()


class Place:
    """Where a method puts an adapter.

    site: the place; rank, scaling, dropout: of the adapter; generator: seeded by the site's name. start: runs the spec's
    initialiser, or gives factors without numbers (device meta) while the adapter is only planned. shared: what all places
    of one pass share, by name (VeRA's matrices); `shapes`: those of all their weights.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int,
        scaling: float,
        generator: torch.Generator,
        start: Callable[[], Initial],
        dropout: float = 0.0,
        planning: bool = False,
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.site = site
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator
        self.planning = planning
        self.shared = {} if shared is None else shared
        self.notes: list[str] = []
        self.initial: Initial | None = None
        self._start = start

    @property
    def bias(self) -> torch.nn.Parameter | None:
        """The site's bias, frozen; it belongs at the end of the method's map."""
        bias = self.site.bias
        return None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    def base(self) -> LinearMap:
        """Return what stands there, frozen, without its bias."""
        site = self.site
        return frozen_base(site.map) if site.fqn in site.program.maps else site.original(site.program.originals, bias=False)

    def started(self) -> tuple[LinearMap, Initial]:
        """Run the initialiser. Returns the frozen base, changed where the initialiser changes it, and the factors."""
        if self.initial is None:
            self.initial = self._start()
            self.notes += self.initial.notes
        changed = self.initial.base
        if changed is None:
            return self.base(), self.initial
        return self.changed_base(changed), self.initial

    def changed_base(self, weight: Tensor) -> LinearMap:
        """Return a frozen dense map, convolution or table of another weight (out_features, in_features)."""
        made = self.site.layout.dense(weight.to(self.site.dtype), None)
        return made.requires_grad_(False)

    def product(self, B: Tensor, A: Tensor) -> LinearMap:
        """Return B @ A as the site's kind of map, trained, with the dropout in front of it; indices are not dropped."""
        B, A = (t.to(self.site.dtype).contiguous() for t in (B, A))
        made = self.site.layout.product(B, A, None)
        if self.dropout == 0.0 or self.site.kind == "embedding":
            return made
        left_out = Dropout(self.site.in_features, self.dropout, self.site.dtype)
        if isinstance(made, Chain):
            return Chain(*made.slots, left_out, names=(*made.names, "dropout"))
        return Chain(made, left_out, names=("kernels", "dropout"))

    def scaled(self, made: LinearMap) -> LinearMap:
        """Return `scaling` times a map."""
        return Scale(made, self.scaling)


def adapter(options: type[AdapterOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a method, a function `(place, options) -> LinearMap`, to its options model (see `lrc.spec.registry`)."""
    return ADAPTERS.rule(options)


__all__ = ["Adapted", "AdapterOptions", "Place", "adapter"]
