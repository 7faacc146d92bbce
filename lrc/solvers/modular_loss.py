"""What an error of a module's output costs."""

from typing import TYPE_CHECKING

import torch

from lrc.errors import SolverError
from lrc.solvers.groups import Member
from lrc.solvers.ladder import Root, identity, root

if TYPE_CHECKING:
    from lrc.solvers.modular import ModularSolver


def output_root(member: Member, options: "ModularSolver") -> Root:
    """Return the root of what an error of a member's output costs."""
    rows = member.weight.shape[0]
    if options.metric == "outputs":
        eye = identity(rows, torch.empty(0, dtype=torch.float64))
        return Root(eye, eye)
    if member.moments.fisher is None:
        raise SolverError("moments.fisher", expected="the second moment of the output gradients", got="none")
    return root(member.moments.fisher, "fisher", options.damping_out)
