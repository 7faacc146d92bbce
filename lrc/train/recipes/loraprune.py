"""loraprune: heads and features are masked while adapters are trained, and taken out when training is over."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from lrc.errors import TrainError, UsageError
from lrc.maps import Chain, LinearMap
from lrc.measure.gates import by_gates, readers
from lrc.program.dependency import Group, cut_units, find_groups
from lrc.solvers.lora_guided import guided_entries, guided_gradient, kept_units, normalised, pruned_share
from lrc.train.recipes.base import Context, Recipe, RecipeOptions, recipe


class LoraPruneRecipe(RecipeOptions):
    """Structured pruning inside training, without gradients of weights; needs `adapt: lora` before."""

    type: Literal["loraprune"] = "loraprune"
    importance: Literal["lora_guided", "taylor"] = Field(
        default="lora_guided",
        description="What a unit is scored by: adapters and their gradients alone, which is LoRAPrune, or, exactly, what the "
        "loss changes by in first order without what the unit gives to its readers, in every row of the batch.",
    )
    width_kept: float = Field(gt=0, le=1, description="Share of the heads and features of every group that stays.")
    every: int = Field(default=10, ge=1, description="Steps between two prunings.")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps before the first one.")
    cooldown: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps after the last one.")
    ema: float = Field(default=0.9, ge=0, lt=1, description="What of the importance a step keeps.")
    power: Literal[1, 2] = Field(
        default=1, description="Of |gradient * weight| (lora_guided): 1 as the authors' code, 2 as their equation."
    )
    skip_first: float = Field(default=0.1, ge=0, lt=1, description="Share of the groups of a kind, in order, that stay whole.")
    skip_last: int = Field(default=1, ge=0, description="Groups of a kind at the end that stay whole.")
    pauses: ClassVar[bool] = False


@recipe(LoraPruneRecipe)
def loraprune(context: Context, options: LoraPruneRecipe) -> Recipe:
    """Return the recipe over the groups that adapted linears alone form. Raises UsageError when there are none.

    Source: Zhang et al. (2024), arXiv:2305.18403. Departures: grouped queries go with their key, whole; biases of what is
    masked go too; the final share is reached in the last pruning, where the authors' code stops short of it. `taylor` is
    not theirs: it is Molchanov et al. (2019), arXiv:1906.10771, with gates on what is read, as in `prune`.
    """
    factors = {fqn: found for fqn in context.fqns if (found := product_of(context.program.map_of(fqn), context)) is not None}
    groups = find_groups(context.program).groups
    mine = [group for group in groups if group.units > 1 and all(fqn in factors for fqn in group.sites)]
    kept: list[Group] = []
    for kind in dict.fromkeys(group.kind for group in mine):
        row = [group for group in mine if group.kind == kind]
        kept += row[int(options.skip_first * len(row)) : len(row) - options.skip_last]
    if not kept:
        raise UsageError(
            "recipe loraprune", expected="heads or features all of whose linears have a trained low-rank adapter", got="none",
            hint="Put `adapt` with `method: lora` on all linears of the blocks before this pass, or lower `skip_last`",
        )  # fmt: skip
    return GuidedPruning(context, kept, factors, options)


def product_of(made: LinearMap, context: Context) -> tuple[Tensor, Tensor] | None:
    """Return the trained A (rank, in_features) and B (out_features, rank) of an adapter, or None."""
    trained = {id(p) for p in context.parameters.values()}
    for part in made.modules():
        if isinstance(part, Chain) and part.names[:2] == ("B", "A"):
            B, A = part.slots[:2]
            if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter) and {id(A), id(B)} <= trained:
                return A, B
    return None


def gone_of(group: Group, share: float) -> int:
    """Return how many units of a group are a share of it; one stays at least."""
    return min(group.units - 1, int(group.units * share + 1e-9))


class GuidedPruning(Recipe):
    """Scores units at every step, masks the least important ones by a schedule, and cuts them at the end."""

    def __init__(
        self,
        context: Context,
        groups: Sequence[Group],
        factors: Mapping[str, tuple[Tensor, Tensor]],
        options: LoraPruneRecipe,
    ) -> None:
        self.program, self.steps, self.options = context.program, context.steps, options
        self.groups = {group.name: group for group in groups}
        self.factors = {fqn: factors[fqn] for group in groups for fqn in group.sites}
        self.importance = {group.name: torch.zeros(group.units) for group in groups}
        self.masks = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
        self.outputs: dict[str, Tensor] = {}
        self.changes: dict[str, list[Tensor]] = {}
        writers = {m.slot[1] for group in groups for m in group.members if m.slot[2] == "out" and m.site is not None}
        placed = {id(made): (fqn, made) for fqn in writers for made in self.program.placed(fqn).values()}
        self.hooks = [made.register_forward_hook(self.hook(fqn)) for fqn, made in placed.values()]
        if options.importance == "taylor":
            read = dict.fromkeys(fqn for group in groups for fqn, _ in readers(group))
            self.hooks += [
                made.register_forward_pre_hook(self.watch(fqn)) for fqn in read for made in self.program.placed(fqn).values()
            ]

    def hook(self, fqn: str) -> Any:
        """Return what sets the outputs of a linear to zero where its units are out."""

        def run(made: LinearMap, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
            mask = self.outputs.get(fqn)
            return None if mask is None else output * mask.to(output)

        return run

    def watch(self, fqn: str) -> Any:
        """Return what keeps, of every backward pass, gradients of gates of ones on what a linear reads, (rows, features)."""

        def run(made: LinearMap, inputs: Sequence[Tensor]) -> Any:
            first, *others = inputs
            if not first.requires_grad:
                return None
            held = first.detach()
            read: Any = first.view_as(first)  # a view of its own: others that read it have other gradients
            read.register_hook(lambda grad: self.changes.setdefault(fqn, []).append((held * grad).flatten(0, -2)))
            return (read, *others)

        return run

    @torch.no_grad()
    def graded(self, done: int) -> None:
        """Take the gradients of a step into the importance, unless one of them is not a number."""
        found = self.guided() if self.options.importance == "lora_guided" else self.gated()
        for name, scores in found.items():
            if bool(scores.isfinite().all()):
                self.importance[name] = self.options.ema * self.importance[name] + (1 - self.options.ema) * scores

    def gated(self) -> dict[str, Tensor]:
        """Return the scores of a step's units by the gradients of gates."""
        changes = {fqn: torch.cat(parts) for fqn, parts in self.changes.items()}
        self.changes = {}
        groups = [group for group in self.groups.values() if all(fqn in changes for fqn, _ in readers(group))]
        return {name: normalised(scores).float() for name, scores in by_gates(groups, [changes]).items()}

    def guided(self) -> dict[str, Tensor]:
        """Return the scores of a step's units by adapters and their gradients."""
        if any(A.grad is None or B.grad is None for A, B in self.factors.values()):
            return {}
        sums: dict[tuple[str, str], Tensor] = {}
        for fqn, (A, B) in self.factors.items():
            assert A.grad is not None, "checked above"
            assert B.grad is not None, "checked above"
            entries = guided_entries(
                self.program.map_of(fqn).matrix(), guided_gradient(A, B, A.grad, B.grad), self.options.power
            )
            sums[fqn, "out"], sums[fqn, "in"] = entries.sum(1).cpu(), entries.sum(0).cpu()
        scores: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            sides = [(m.site, m) for m in group.members if m.site is not None]
            parts = [normalised(sums[fqn, m.slot[2]][torch.from_numpy(m.index)].sum(1)) for fqn, m in sides]
            scores[name] = torch.stack(parts).sum(0)
        return scores

    def after(self, done: int) -> None:
        """Mask more units where it is time to."""
        last = math.ceil((1 - self.options.cooldown) * self.steps)
        if (done + 1) % self.options.every == 0 or done + 1 in (last, self.steps):
            share = pruned_share(
                done + 1, self.steps, initial=0.0, final=1 - self.options.width_kept,
                warmup=self.options.warmup, cooldown=self.options.cooldown,
            )  # fmt: skip
            self.check(share)
            for name, group in self.groups.items():
                self.masks[name] = kept_units(self.importance[name], self.masks[name], gone_of(group, share))
            self.show()

    def check(self, share: float) -> None:
        """Raise TrainError where units would go that nothing tells apart."""
        blind = [n for n, group in self.groups.items() if gone_of(group, share) and not bool(self.importance[n].any())]
        if blind:
            raise TrainError(
                "recipe loraprune", message=f"no gradient has reached the adapters of {blind[0]}: no unit tells from another",
                hint="Choose an objective that the model does not meet before it is pruned: labels or `causal_lm`; "
                "`distillation` has it for its own teacher",
            )  # fmt: skip

    def comparable(self) -> bool:
        """Say whether everything that goes is out: what still runs whole does better, and is not what the run ends with."""
        final = 1 - self.options.width_kept
        return all(int((~self.masks[name]).sum()) == gone_of(group, final) for name, group in self.groups.items())

    def show(self) -> None:
        """Let the masks of units be masks of the outputs of linears."""
        self.outputs = {}
        for name, group in self.groups.items():
            out = torch.from_numpy(np.flatnonzero(~self.masks[name].numpy()))
            for member in group.members if len(out) else ():
                if member.site is not None and member.slot[2] == "out":
                    size = self.program.sites[member.site].out_features
                    mask = self.outputs.setdefault(member.site, torch.ones(size))
                    mask[torch.from_numpy(member.index)[out].flatten()] = 0

    def state(self) -> dict[str, Any]:
        """Return masks and importance."""
        return {"masks": self.masks, "importance": self.importance}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        self.masks, self.importance = dict(state["masks"]), dict(state["importance"])
        self.show()

    def finish(self) -> list[str]:
        """Take out what is masked; the groups are found anew, for training may have given maps other tensors."""
        for hook in self.hooks:
            hook.remove()
        gone = {name: np.flatnonzero(~mask.numpy()) for name, mask in self.masks.items()}
        notes = cut_units(self.program, find_groups(self.program), gone, "train")
        kept = [f"{name}: {int(mask.sum())} of {len(mask)} {self.groups[name].kind} stay" for name, mask in self.masks.items()]
        return [*kept, *notes]
