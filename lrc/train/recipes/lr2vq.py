"""lr2vq: pieces of weights in a few dimensions are trained, then clustered while they are trained, then stored as codes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.errors import UsageError
from lrc.maps import Chain, Conv, Geometry, LinearMap, Segments, coded, fold
from lrc.program import Program
from lrc.solvers.kmeans import kmeans, nearest, softly
from lrc.solvers.lr2vq import orthonormal
from lrc.train.distributed import world
from lrc.train.optim import PerLayer
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class Lr2vqRecipe(RecipeOptions):
    """Cluster the coefficients of pieces while they and their basis follow the loss."""

    type: Literal["lr2vq"] = "lr2vq"
    k: int = Field(default=256, ge=2, le=65536, description="Codewords, log2(k) bits a code.")
    pretrain: float = Field(default=0.5, ge=0, lt=1, description="Share of the steps before anything is clustered.")
    assign: Literal["dkm", "straight_through"] = Field(
        default="dkm",
        description="dkm: soft assignments that gradients pass through; straight_through: hard ones, whose gradients reach "
        "codewords and coefficients alike.",
    )
    tau: float = Field(
        default=5e-3, gt=0, description="Temperature of soft assignments, over the mean squared distance to the mean."
    )
    turns: int = Field(default=5, ge=1, description="Soft turns a step.")
    every: int = Field(default=10, ge=1, description="Steps between two new assignments, where they are hard.")
    iterations: int = Field(default=100, ge=0, description="Turns of k-means before the first clustered step, at most.")
    dtype: Literal["float16", "model"] = Field(default="float16", description="Of codewords and basis at the end.")
    pauses: ClassVar[bool] = False


@recipe(Lr2vqRecipe)
def lr2vq(context: Context, options: Lr2vqRecipe) -> Recipe:
    """Return the recipe over the sites in pieces among what is trained. Raises UsageError where there are none.

    Source: Zhu, Zhou & Zhong (2022), LR2VQ, arXiv:2211.11397, whose code is not published; soft assignments: Cho et al. (2022),
    DKM, arXiv:2108.12659. Departures: distances are those between the pieces whatever the basis is by then, and the
    temperature is relative, so that neither depends on the gauge or scale of the coefficients.
    """
    made = {fqn: context.program.maps.get(fqn) for fqn in context.fqns}
    trained = {id(p) for p in context.parameters.values()}
    layers = {fqn: m for fqn, m in made.items() if isinstance(m, Chain) and in_pieces(m, trained)}
    if not layers:
        raise UsageError(
            "recipe lr2vq", expected="weights in pieces that are not clustered yet, and trained", got="none",
            hint="Put `factorize` with `solver: {type: lr2vq, k: null}` before this pass",
        )  # fmt: skip
    if options.assign == "straight_through" and isinstance(context.optimizer, PerLayer):
        raise UsageError(
            "recipe lr2vq", message="codewords with hard assignments are trained, and `per_layer` trains no more than the maps",
            hint="Set `per_layer: false`, or `assign: dkm`",
        )  # fmt: skip
    if options.assign == "straight_through" and world().size > 1:
        raise UsageError(
            "recipe lr2vq", message="gradients of codewords, which are no part of the model, are not averaged over processes",
            hint="Set `assign: dkm`, or train in one process",
        )  # fmt: skip
    return Clustering(context, layers, options)


def in_pieces(made: Chain, trained: set[int]) -> bool:
    """Say whether a chain is trained coefficients after the basis of every segment."""
    if made.names != ("B", "A") or not isinstance(made.slots[1], Segments):
        return False
    outer = made.slots[0]
    held = outer.weight if isinstance(outer, Conv) else outer
    return isinstance(held, nn.Parameter) and id(held) in trained


class Layer:
    """One weight in pieces: coefficients Z (n, d) and basis P (d, m) of its map, codewords E (k, d), codes (n,)."""

    def __init__(self, made: Chain, k: int) -> None:
        self.made = made
        outer, segments = made.slots
        assert isinstance(segments, Segments), "checked where layers are chosen"
        held = outer.weight if isinstance(outer, Conv) else outer
        assert isinstance(held, nn.Parameter), "checked where layers are chosen"
        self.held, self.segments = held, segments
        self.E = nn.Parameter(torch.zeros(k, segments.d, dtype=held.dtype, device=held.device))
        self.codes = torch.zeros(held.numel() // segments.d, dtype=torch.int64, device=held.device)
        self.moved: Tensor | None = None

    @property
    def coefficients(self) -> Tensor:
        """The coefficients, (n, d)."""
        return self.held.reshape(-1, self.segments.d)

    @torch.no_grad()
    def metric(self) -> Tensor:
        """Return M (d, d) such that |(a - b) M| is the distance of the pieces that coefficients a and b stand for."""
        R: Tensor = torch.linalg.qr(self.segments.basis.detach().T)[1]
        return R.T

    @torch.no_grad()
    def start(self, iterations: int, seed: int) -> None:
        """Make the basis orthonormal, at no change of the weight, and find codewords by k-means."""
        Z, P, _ = orthonormal(self.coefficients, self.segments.basis)
        self.held.copy_(Z.reshape(self.held.shape))
        self.segments.basis.copy_(P)
        found = kmeans(self.coefficients, len(self.E), iterations, torch.Generator().manual_seed(seed))
        self.E.copy_(found.codewords)
        self.codes.copy_(found.codes)

    @torch.no_grad()
    def assign(self) -> None:
        """Give every piece its nearest codeword."""
        M = self.metric()
        self.codes.copy_(nearest(self.coefficients @ M, self.E @ M))

    def applied(self, x: Tensor, Z: Tensor) -> Tensor:
        """Return what the map gives for x with other coefficients."""
        weight, h = Z.reshape(self.held.shape), self.segments(x)
        if self.segments.spatial:
            return Geometry.unit(self.segments.spatial)(h, weight, self.made.bias)
        return F.linear(h, weight, self.made.bias)

    def stored(self, dtype: torch.dtype) -> LinearMap:
        """Return the map in codes."""
        bias = None if self.made.bias is None else self.made.bias.detach().clone()
        return coded(self.codes, self.E, self.segments, self.held.shape[0], dtype, bias)


class Clustering(Recipe):
    """Runs layers on their coefficients first, then on what is made of codewords; leaves codes behind."""

    def __init__(self, context: Context, layers: Mapping[str, Chain], options: Lr2vqRecipe) -> None:
        self.program: Program = context.program
        self.layers = {fqn: Layer(made, options.k) for fqn, made in layers.items()}
        self.options, self.seed = options, context.seed
        self.first = int(options.pretrain * context.steps)
        self.clustered = self.fresh = False
        self.hooks = [made.register_forward_hook(self.hook(fqn)) for fqn, made in layers.items()]
        if options.assign == "straight_through":
            context.optimizer.add_param_group({"params": [layer.E for layer in self.layers.values()]})

    def hook(self, fqn: str) -> Any:
        """Return what replaces the output of a layer once it is clustered."""

        def run(made: Chain, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
            layer = self.layers[fqn]
            if not self.clustered:
                return None
            if not made.training:
                self.refresh()
                return layer.applied(inputs[0], layer.E[layer.codes])
            if self.options.assign == "straight_through":
                return layer.applied(inputs[0], layer.E[layer.codes] + (layer.coefficients - layer.coefficients.detach()))
            start = layer.E.detach().clone()  # the backward pass reads it, after codewords have moved on
            E, Z = softly(layer.coefficients, start, self.options.tau, self.options.turns, layer.metric())
            layer.moved = E.detach()
            return layer.applied(inputs[0], Z)

        return run

    def refresh(self) -> None:
        """Assign pieces anew where soft assignments have moved codewords."""
        if not self.fresh and self.options.assign == "dkm":
            for layer in self.layers.values():
                layer.assign()
        self.fresh = True

    def before(self, done: int) -> None:
        """Cluster at the first step that runs on codewords; assign anew every few steps."""
        if done == self.first:
            for layer in self.layers.values():
                layer.start(self.options.iterations, self.seed)
            self.clustered = True
        elif done > self.first and self.options.assign == "straight_through" and (done - self.first) % self.options.every == 0:
            for layer in self.layers.values():
                layer.assign()

    def after(self, done: int) -> None:
        """Let soft assignments move the codewords."""
        for layer in self.layers.values():
            if layer.moved is not None:
                layer.E.detach().copy_(layer.moved)
                layer.moved = None
        self.fresh = False

    def tensors(self) -> dict[str, Tensor]:
        """Return codewords and codes."""
        found = {f"{fqn}.codewords": layer.E for fqn, layer in self.layers.items()}
        return {**found, **{f"{fqn}.codes": layer.codes for fqn, layer in self.layers.items()}}

    def comparable(self) -> bool:
        """Say whether weights are clustered yet: those that are not do better, and are not what the run ends with."""
        return self.clustered

    def state(self) -> dict[str, Any]:
        """Return whether codewords have been found."""
        return {"clustered": self.clustered}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take it over."""
        self.clustered = bool(state["clustered"])

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Leave codes; a layer that codes would make larger becomes dense, with the weight that they stand for."""
        self.fresh = False
        self.refresh()
        numbers = stored = 0
        notes = []
        for hook in self.hooks:
            hook.remove()
        for fqn, layer in self.layers.items():
            new = layer.stored(torch.float16 if self.options.dtype == "float16" else layer.held.dtype)
            whole = fold(new)
            numbers += new.out_features * new.in_features
            if new.cost().bytes >= whole.cost().bytes:
                new = whole
                notes.append(f"{fqn}: {self.options.k} codewords take more than the dense weight, which it becomes")
            stored += new.cost().bytes - new.bias_cost(1).bytes
            self.program.replace(fqn, new, "train", settle=False)
        self.program.settle()
        return [f"{len(self.layers)} weights in codes: {8 * stored / numbers:.3f} bits a number", *notes]
