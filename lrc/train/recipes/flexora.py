"""flexora: a gate for the adapters of every layer, moved by a loss on other data; layers whose gate falls lose theirs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrc.data import Batch
from lrc.errors import TrainError, UsageError
from lrc.maps import Dense, LinearMap, Sum
from lrc.spec.base import SpecModel
from lrc.train.data import DataField, Examples
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class Positive(SpecModel):
    """Layers whose logit has risen, as published."""

    type: Literal["positive"] = "positive"

    def chosen(self, logits: Sequence[float]) -> list[int]:
        """Return the places of what is kept."""
        return [i for i, logit in enumerate(logits) if logit > 0]


class TopK(SpecModel):
    """The layers of the largest logits."""

    type: Literal["top_k"] = "top_k"
    layers: int = Field(ge=1, description="How many; all where there are no more.")

    def chosen(self, logits: Sequence[float]) -> list[int]:
        """Return the places of what is kept; of equal logits the first ones."""
        return sorted(sorted(range(len(logits)), key=lambda i: -logits[i])[: self.layers])


class Threshold(SpecModel):
    """Layers whose logit is above a bound."""

    type: Literal["threshold"] = "threshold"
    above: float = Field(description="The bound; logits start at 0.")

    def chosen(self, logits: Sequence[float]) -> list[int]:
        """Return the places of what is kept."""
        return [i for i, logit in enumerate(logits) if logit > self.above]


def _from_word(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


SelectField = Annotated[
    Annotated[Positive | TopK | Threshold, Field(discriminator="type")],
    BeforeValidator(_from_word, json_schema_input_type=Positive | TopK | Threshold | Literal["positive"]),
]


class FlexoraRecipe(RecipeOptions):
    """Choose the layers that keep their adapters, by gates that a loss on other data moves."""

    type: Literal["flexora"] = "flexora"
    data: DataField = Field(description="What the gates are moved by; nothing of it should be trained on.")
    unroll: int = Field(default=1, ge=0, description="Steps of SGD that are differentiated; 0: first order, as published.")
    inner_lr: float | None = Field(default=None, gt=0, description="Rate of these steps; that of the training without it.")
    lr: float = Field(default=0.01, gt=0, description="Learning rate of the gates, by Adam.")
    every: int = Field(default=1, ge=1, description="Steps of training between two of the gates.")
    batches: int = Field(default=8, ge=1, description="Batches of the data for one step of the gates.")
    select: SelectField = Field(default=Positive(), description="Which layers keep their adapters.")
    pauses: ClassVar[bool] = False


@recipe(FlexoraRecipe)
def flexora(context: Context, options: FlexoraRecipe) -> Recipe:
    """Return the recipe. Raises UsageError without adapters that a gate can be put on, and for too little data.

    Source: Wei et al. (2024), arXiv:2408.10774, equations 5 to 8; with `unroll: 0` the step of its published code. Departure:
    a gate scales the output of an adapter once (in that code the inputs of A, of B and of the dropout, so its third power).
    """
    program = context.program
    layers: dict[str, list[str]] = {}
    for fqn in context.fqns:
        if fqn not in program.adapters:
            continue
        made = program.maps[fqn]
        if not is_gated(made) or program.adapters[fqn].initial is not None:
            raise UsageError(
                "recipe flexora", message=f"{fqn}: {made!r} has no adapter that is added to the weight and starts at zero",
                hint="Adapt with `method: lora` and an initialiser that leaves the weight as it is",
            )  # fmt: skip
        layers.setdefault(layer_name(fqn), []).append(fqn)
    if not layers:
        raise UsageError("recipe flexora", expected="adapters", got="none", hint="Put `adapt` before this pass")
    return Gates(context, layers, options)


def is_gated(made: LinearMap) -> bool:
    """Say whether a map is a weight and an adapter that is a map of its own."""
    return isinstance(made, Sum) and made.names == ("base", "adapter") and isinstance(made.slots[1], LinearMap)


def layer_name(fqn: str) -> str:
    """Return the name up to the first number in it; a name without any is its own layer."""
    parts = fqn.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: at + 1])


class Stream:
    """Batches one after the other, every epoch in another order."""

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self.examples, self.size, self.seed = examples, min(batch_size, len(examples)), seed
        self.per_epoch = len(examples.epoch(self.size, seed, 0))
        self.epoch: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, number: int) -> Batch:
        """Return a batch by its number from the start."""
        epoch, place = divmod(number, self.per_epoch)
        if self.epoch[0] != epoch:
            self.epoch = epoch, self.examples.epoch(self.size, self.seed, epoch)
        return self.examples.batch(self.epoch[1][place % len(self.epoch[1])])


class Gates(Recipe):
    """One logit a layer; its gate is L softmax(logits), 1 at the start and on average."""

    def __init__(self, context: Context, layers: Mapping[str, list[str]], options: FlexoraRecipe) -> None:
        assert context.own is not None, "the pass gives what losses need"
        self.program, self.own, self.options, self.seed = context.program, context.own, options, context.seed
        self.optimizer, self.parameters, self.layers = context.optimizer, context.parameters, dict(layers)
        double = any(p.dtype == torch.float64 for p in context.parameters.values())
        self.logits = torch.zeros(len(layers), dtype=torch.float64 if double else torch.float32, requires_grad=True)
        self.steps = torch.optim.Adam([self.logits], lr=options.lr)
        self.attached = False
        self.start = {name: p.detach().clone() for name, p in context.parameters.items()}
        self.trained = Stream(context.own.examples, context.own.batch_size, context.seed + 1)
        self.judged = Stream(context.own.read(options.data), context.own.batch_size, context.seed)
        self.hooks = [
            adapter_of(self.program.maps[fqn]).register_forward_hook(self.hook(place))
            for place, fqns in enumerate(layers.values())
            for fqn in fqns
        ]

    def gates(self) -> Tensor:
        """Return the gates (layers,); they carry the graph while the logits are moved."""
        made = len(self.logits) * torch.softmax(self.logits, 0)
        return made if self.attached else made.detach()

    def hook(self, place: int) -> Any:
        """Return what scales the output of an adapter by the gate of its layer."""
        return lambda adapter, inputs, output: output * self.gates()[place].to(output.dtype)

    def after(self, done: int) -> None:
        """Move the logits by one step of Adam on the hypergradient."""
        if (done + 1) % self.options.every == 0:
            self.logits.grad = self.hypergradient(done // self.options.every)
            self.steps.step()
            self.logits.grad = None

    def hypergradient(self, number: int) -> Tensor:
        """Return d R(theta_T(alpha), alpha) / d alpha, R the mean loss of some batches of the gates' data in eval mode.

        theta_T: the trained parameters after `unroll` steps of SGD from where they are; neither they nor the logits change.
        """
        self.attached = True
        try:
            values = self.unrolled(number) if self.options.unroll else None
            self.own.module.eval()
            total = torch.zeros_like(self.logits)
            for i in range(self.options.batches):
                batch = self.judged.batch(number * self.options.batches + i)
                loss = self.own.loss(batch, self.generator(number, i), judged=True, values=values)
                (found,) = torch.autograd.grad(loss, [self.logits], retain_graph=values is not None, allow_unused=True)
                total += 0.0 if found is None else found
            return total / self.options.batches
        finally:
            self.attached = False

    def unrolled(self, number: int) -> dict[str, Tensor]:
        """Return the parameters after the inner steps, as functions of the logits."""
        rate = self.options.inner_lr or self.optimizer.param_groups[0]["lr"]
        values = {name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        self.own.module.train()
        for t in range(self.options.unroll):
            batch = self.trained.batch(number * self.options.unroll + t)
            torch.manual_seed(self.seed * 1_000_003 + number)
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                loss = self.own.loss(batch, self.generator(number, t), judged=False, values=values)
                grads = torch.autograd.grad(loss, list(values.values()), create_graph=True, allow_unused=True)
            values = {
                name: value if grad is None else value - rate * grad
                for (name, value), grad in zip(values.items(), grads, strict=True)
            }
        return values

    def generator(self, number: int, i: int) -> torch.Generator:
        """Return the generator of a batch."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + 1009 * number + i)

    def state(self) -> dict[str, Any]:
        """Return the logits and the state of their optimiser."""
        return {"logits": self.logits.detach().clone(), "steps": self.steps.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        self.logits.data.copy_(state["logits"])
        self.steps.load_state_dict(state["steps"])

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Take the adapters of unselected layers away; the others go back to where they stood before, with a gate of 1.

        Raises TrainError when the rule keeps no layer.
        """
        logits = self.logits.tolist()
        kept = set(self.options.select.chosen(logits))
        told = ", ".join(f"{layer} {logit:+.3f}" for layer, logit in zip(self.layers, logits, strict=True))
        if not kept:
            raise TrainError(
                "recipe flexora", message=f"`select: {self.options.select.type}` keeps no layer; logits: {told}",
                hint="Select with {type: top_k, layers: …}, or train longer",
            )  # fmt: skip
        for hook in self.hooks:
            hook.remove()
        for name, value in self.start.items():
            self.parameters[name].copy_(value)
        for place, fqns in enumerate(self.layers.values()):
            for fqn in fqns if place not in kept else ():
                self.program.replace(fqn, without_adapter(self.program.maps[fqn]), "train", settle=False)
        self.program.settle()
        names = [layer for place, layer in enumerate(self.layers) if place in kept]
        return [f"{len(kept)} of {len(logits)} layers keep their adapters: {', '.join(names)}", f"logits of the gates: {told}"]


def adapter_of(made: LinearMap) -> LinearMap:
    """Return the adapter of a map that `is_gated`."""
    assert isinstance(made, Sum) and isinstance(made.slots[1], LinearMap), "checked before"  # noqa: PT018 - for the types
    return made.slots[1]


def without_adapter(made: LinearMap) -> LinearMap:
    """Return the frozen weight of an adapted map, with its bias."""
    assert isinstance(made, Sum), "only sums are gated"
    base = made.slots[0]
    return base.with_bias(made.bias) if isinstance(base, LinearMap) else Dense(base, made.bias)
