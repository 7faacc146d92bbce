"""fold_norms: a batch norm in eval mode goes into the linear or convolution before it.

norm(W x + b)  ->  (s W) x + (s b + t),   s = gamma / sqrt(variance + eps),  t = beta - s mean

%h = conv2d(%x, conv.weight, conv.bias);  %y = batch_norm(%h, norm.weight, …)
%y = conv2d(%x, conv.weight, conv.bias)

Before `factorize` this gives every convolution a bias, which then carries the mean of what is dropped at no cost. The outputs
are the same to rounding. A second time there is nothing left to fold. The batch norm's module becomes an identity in
the grafted model, so that it no longer follows the batch in training.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lrc.maps import LinearMap, scale_outputs
from lrc.program import Program, Site
from lrc.program.batch_norms import BatchNorm, fold_norm, norm_after
from lrc.run import Decision, PassOptions, program_pass
from lrc.run.plan import Summary
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session
from lrc.run.summary import summarize


class FoldNorms(PassOptions):
    """Fold batch norms into the linears and convolutions before them."""

    type: Literal["fold_norms"] = "fold_norms"

    def obstacle_at(self, site: Site) -> str | None:
        """Return None: any weight will do."""
        return None


@program_pass(FoldNorms)
class FoldNormsPass:
    """The two halves of `fold_norms`."""

    def plan(self, program: Program, session: Session, options: FoldNorms, index: int) -> Sequence[Decision]:
        """Find the batch norm after every selected site."""
        return [self.decide(program, selected, options, index) for selected in select_sites(program, session, options, index)]

    def decide(self, program: Program, selected: Selected, options: FoldNorms, index: int) -> Decision:
        """Return what is to be done with one site, its batch norm counted with it before."""
        found = self.folded(program, selected)
        before = summarize(program.map_of(selected.fqn))
        decision = Decision(index, options.type, (selected.fqn,), selected.rule, before, before)
        if isinstance(found, str):
            return replace(decision, keep=found)
        norm, made = found
        note = f"the batch norm {norm.module} is folded"
        return replace(decision, before=with_norm(before, norm), after=summarize(made), notes=(note,))

    def folded(self, program: Program, selected: Selected) -> tuple[BatchNorm, LinearMap] | str:
        """Return the batch norm after a site and the map that does what both do, or the reason why there is none."""
        if selected.keep:
            return selected.keep
        norm = norm_after(program, program.sites[selected.fqn])
        if norm is None:
            return "no batch norm follows"
        if isinstance(norm, str):
            return norm
        made = scale_outputs(program.map_of(selected.fqn), norm.scale, norm.shift)
        return "its map takes no scale of its outputs" if made is None else (norm, made)

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Make the maps again and take the batch norms out."""
        for decision in session.track(options.type, [d for d in decisions if d.keep is None]):
            found = self.folded(program, Selected(decision.sites[0], decision.rule))
            assert not isinstance(found, str), "planning found a batch norm"
            fold_norm(program, decision.sites[0], *found, decision.type)
        program.settle()
        return decisions


def with_norm(before: Summary, norm: BatchNorm) -> Summary:
    """Return the numbers of a map and the batch norm after it: a multiply-add for every feature."""
    features = len(norm.scale)
    return Summary(
        before.text,
        before.parameters + norm.numbers,
        before.bytes + norm.bytes,
        before.flops + 2 * features,
    )
