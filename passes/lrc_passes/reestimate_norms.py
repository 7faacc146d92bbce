"""reestimate_norms: batch norms get the statistics of what they read now.

%y = batch_norm(%h, weight, bias, mean, variance)  ->  the same with the mean and variance of %h on the calibration data

A compressed layer gives outputs of another mean and spread than the batch norm behind it was trained on. Measured in graph
order, so that every norm is behind the corrected ones. For batch norms that are kept; those that `fold_norms` took are gone. A
second time changes nothing beyond rounding.
Source: Jordan et al. (2023), REPAIR, arXiv:2211.08403, who correct networks that were averaged; here for low-rank ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lrc.measure.norm_statistics import norm_statistics
from lrc.program import Program, Site
from lrc.program.batch_norms import norm_node, set_statistics
from lrc.run import Decision, PassOptions, program_pass
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session
from lrc.run.summary import summarize


class ReestimateNorms(PassOptions):
    """Measure the statistics of the batch norms behind linears and convolutions again."""

    type: Literal["reestimate_norms"] = "reestimate_norms"

    def obstacle_at(self, site: Site) -> str | None:
        """Return None: any weight will do."""
        return None


@program_pass(ReestimateNorms)
class ReestimateNormsPass:
    """The two halves of `reestimate_norms`."""

    def plan(self, program: Program, session: Session, options: ReestimateNorms, index: int) -> Sequence[Decision]:
        """Find the batch norm after every selected site."""
        return [self.decide(program, selected, options, index) for selected in select_sites(program, session, options, index)]

    def decide(self, program: Program, selected: Selected, options: ReestimateNorms, index: int) -> Decision:
        """Return whether a batch norm with stored statistics reads what a site gives."""
        map_ = summarize(program.map_of(selected.fqn))
        decision = Decision(index, options.type, (selected.fqn,), selected.rule, map_, map_, keep=selected.keep)
        if selected.keep:
            return decision
        if norm_node(program, program.sites[selected.fqn]) is None:
            return replace(decision, keep="no batch norm with statistics of its own follows")
        return replace(decision, notes=("the batch norm's statistics are measured again",))

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Measure them all, and put them in place."""
        sites = [program.sites[d.sites[0]] for d in decisions if d.keep is None]
        nodes = dict.fromkeys(node.name for site in sites if (node := norm_node(program, site)) is not None)
        if nodes:
            set_statistics(program, norm_statistics(program, session.batches, list(nodes)))
        program.settle()
        return decisions
