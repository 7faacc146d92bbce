"""maestro: factors whose components are trained in order of importance, and dropped while they are trained."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.errors import UsageError
from lrc.maps import Chain, Dense, LinearMap
from lrc.program import Program
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe

TINY = 1e-12  # under the roots: a suffix of zeros has no gradient


class MaestroRecipe(RecipeOptions):
    """Ordered dropout on the ranks of factorized linears, a group lasso, and shrinking every epoch."""

    type: Literal["maestro"] = "maestro"
    sampler: Literal["single_layer", "independent"] = Field(
        default="single_layer", description="One layer a step runs at a drawn rank, each (layer, rank) once a sweep; or all do."
    )
    group_lasso: float = Field(default=1e-6, ge=0, description="Weight of the penalty.")
    kind: Literal["hierarchical", "plain"] = Field(
        default="hierarchical", description="Norms of all later components, or each."
    )
    threshold: float = Field(
        default=1e-7, ge=0, description="Components of less importance are dropped at the end of an epoch."
    )
    warmup_epochs: int = Field(default=0, ge=0, description="Epochs at full rank before ranks are drawn.")

    def step_bytes(self, trained: Mapping[str, Tensor]) -> int:
        """Return the size of the factors: the penalty reads a copy of their active components, and they are all at first."""
        factors = [t.nbytes for name, t in trained.items() if name.endswith((".A", ".B"))]
        return sum(factors) if self.group_lasso else 0


@recipe(MaestroRecipe)
def maestro(context: Context, options: MaestroRecipe) -> Recipe:
    """Return the recipe over the two-factor linears among the trained sites. Raises UsageError when there are none.

    Source: Horvath et al. (2024), ICML, algorithm 1. Departures: dropped components are set to zero and stay so (in the
    authors' code decay moves them on); no second pass at full rank; convolutions train along at full rank.
    """
    made = {fqn: context.program.maps.get(fqn) for fqn in context.fqns}
    layers = {fqn: m for fqn, m in made.items() if isinstance(m, Chain) and is_pair(m, context)}
    if not layers:
        raise UsageError(
            "recipe maestro", expected="linears in two factors that are both trained", got="none",
            hint="Put `factorize` with `form: two_factor` before this pass",
        )  # fmt: skip
    return OrderedRanks(context, layers, options)


def is_pair(made: Chain, context: Context) -> bool:
    """Say whether a chain is two bare matrices that are trained."""
    trained = {id(p) for p in context.parameters.values()}
    return made.names == ("B", "A") and all(isinstance(s, nn.Parameter) and id(s) in trained for s in made.slots)


def factors(made: Chain) -> tuple[Tensor, Tensor]:
    """Return A (rank, in_features) and B (out_features, rank) of a layer."""
    B, A = made.slots
    assert isinstance(A, Tensor), "only chains of bare matrices are trained so"
    assert isinstance(B, Tensor), "only chains of bare matrices are trained so"
    return A, B


def norms(A: Tensor, B: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the norms of the rows of A and of the columns of B, or of all those from each place on: (rank,) each."""
    squares = A.square().sum(1), B.square().sum(0)
    if kind == "hierarchical":
        squares = tuple(s.flip(0).cumsum(0).flip(0) for s in squares)  # type: ignore[assignment]  # two of them
    return (squares[0] + TINY).sqrt(), (squares[1] + TINY).sqrt()


def penalty(A: Tensor, B: Tensor, kind: str) -> Tensor:
    """Return the sum over components i of |A[i:]| + |B[:, i:]| (hierarchical), or of |A[i]| + |B[:, i]| (plain)."""
    a, b = norms(A, B, kind)
    return a.sum() + b.sum()


class OrderedRanks(Recipe):
    """Draws ranks, runs the drawn layers on their first components, and drops unimportant components."""

    def __init__(self, context: Context, layers: Mapping[str, Chain], options: MaestroRecipe) -> None:
        self.program: Program = context.program
        self.layers, self.options, self.seed, self.per_epoch = dict(layers), options, context.seed, context.per_epoch
        self.active = {fqn: torch.arange(len(factors(made)[0])) for fqn, made in layers.items()}
        self.drawn: dict[str, int] = {}
        self.pairs: list[tuple[str, int]] = []
        self.sweep = 0
        self.hooks = [made.register_forward_hook(self.hook(fqn)) for fqn, made in layers.items()]

    def hook(self, fqn: str) -> Any:
        """Return what replaces the output of a layer in training by that of its first `drawn` active components."""

        def run(made: Chain, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
            if fqn not in self.drawn or not made.training:
                return None
            kept = self.active[fqn][: self.drawn[fqn]]
            A, B = factors(made)
            return F.linear(F.linear(inputs[0], A[kept]), B[:, kept], made.bias)

        return run

    def before(self, done: int) -> None:
        """Draw: the next pair of the sweep, or a rank for every layer."""
        if done < self.options.warmup_epochs * self.per_epoch:
            self.drawn = {}
        elif self.options.sampler == "independent":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done)
            self.drawn = {
                fqn: int(torch.randint(1, len(kept) + 1, (), generator=generator)) for fqn, kept in self.active.items()
            }
        else:
            self.pairs = self.pairs or self.new_sweep()
            fqn, width = self.pairs.pop()
            self.drawn = {fqn: width}

    def new_sweep(self) -> list[tuple[str, int]]:
        """Return every (layer, rank) once, in a random order."""
        pairs = [(fqn, j) for fqn, kept in self.active.items() for j in range(1, len(kept) + 1)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.sweep)
        self.sweep += 1
        return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]

    def penalty(self) -> Tensor | None:
        """Return the group lasso over all layers."""
        if not self.options.group_lasso:
            return None
        terms = [penalty(*self.kept(fqn), self.options.kind) for fqn in self.layers]
        return self.options.group_lasso * torch.stack(terms).sum()

    def kept(self, fqn: str) -> tuple[Tensor, Tensor]:
        """Return the active rows of A and columns of B."""
        (A, B), places = factors(self.layers[fqn]), self.active[fqn]
        return A[places], B[:, places]

    @torch.no_grad()
    def after(self, done: int) -> None:
        """Keep dropped components at zero; at the end of an epoch drop those of too little importance, all but one."""
        if (done + 1) % self.per_epoch == 0:
            for fqn, places in self.active.items():
                a, b = norms(*self.kept(fqn), self.options.kind)
                important = a * b >= self.options.threshold
                important[(a * b).argmax()] = True
                if not bool(important.all()):
                    self.active[fqn] = places[important]
                    self.pairs = []
        for fqn, places in self.active.items():
            A, B = factors(self.layers[fqn])
            gone = torch.ones(len(A), dtype=torch.bool).index_fill_(0, places, False)
            A[gone] = 0
            B[:, gone] = 0

    def state(self) -> dict[str, Any]:
        """Return the active components and where the sweep is."""
        return {"active": self.active, "pairs": list(self.pairs), "sweep": self.sweep}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        self.active, self.sweep = dict(state["active"]), state["sweep"]
        self.pairs = [(fqn, width) for fqn, width in state["pairs"]]

    def pause(self) -> list[str]:
        """Remove dropped components; every layer stays a product."""
        return self.remove(dense=False)

    def finish(self) -> list[str]:
        """Remove dropped components; what is then no smaller than a dense weight becomes one."""
        return self.remove(dense=True)

    def remove(self, *, dense: bool) -> list[str]:
        """Remove dropped components from the layers.

        What is dropped is read off the values: a validation may have brought those of an earlier step back, where more stood.
        """
        for hook in self.hooks:
            hook.remove()
        notes = []
        for fqn, made in self.layers.items():
            A, B = factors(made)
            stands = (A != 0).any(1) | (B != 0).any(0)
            stands[0] |= not bool(stands.any())
            places, full = stands.nonzero().flatten(), len(A)
            A, B = A.detach()[places].contiguous(), B.detach()[:, places].contiguous()
            bias = None if made.bias is None else made.bias.detach().clone()
            new: LinearMap = Chain(B, A, bias=bias)
            if dense and made.out_features * made.in_features < len(places) * (made.out_features + made.in_features):
                new = Dense(*new.dense())
            if len(places) < full or isinstance(new, Dense):
                self.program.replace(fqn, new, "train", settle=False)
                notes.append(
                    f"{fqn}: {len(places)} of {full} components stay" + (", as a dense weight" * isinstance(new, Dense))
                )
        self.program.settle()
        return notes
