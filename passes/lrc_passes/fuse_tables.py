"""fuse_tables: the matrix behind a factorized table goes into the linears that read it, and the features between get fewer.

W [e; z] + b with e = B t + c  ->  (W_e B) t + W_z z + (b + W_e c)

%t = embedding(%i, table.A: f32[N, r]);  %e = linear(%t, table.B: f32[d, r])
%y = linear(concat([%e, %z], -1), fc.weight: f32[m, d + n], fc.bias)

%t = embedding(%i, table: f32[N, r])
%y = linear(concat([%t, %z], -1), fc.weight: f32[m, r + n], fc.bias)

The outputs are the same to rounding. It takes linears alone behind the table, with nothing between them that computes: where a
product of features, an attention or a norm reads them too, the table stays. A second time there is nothing left to do.
Source: Yu, Fu, Ding, Zhou & Wu (2024), arXiv:2405.18146, section 3 (the embedding's decompression in the first layer).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from lrc.maps import Chain, Dense, LinearMap, Lookup, Rows, rebuilt
from lrc.program import Program, Site
from lrc.program.dependency import Groups, cut_units, find_groups
from lrc.run import Decision, PassOptions, program_pass
from lrc.run.plan import Summary
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session
from lrc.run.summary import summarize

aten = torch.ops.aten
MOVES = {
    aten.cat.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int,
    aten.contiguous.default, aten.clone.default,
}  # fmt: skip
"""What features may pass through on their way: nothing that computes."""
Array = NDArray[np.int64]


class FuseTables(PassOptions):
    """Multiply the matrices behind factorized tables into the linears that alone read them."""

    type: Literal["fuse_tables"] = "fuse_tables"
    targets: list[str] = Field(
        default=["type:Embedding"], min_length=1, description="Patterns of the tables; ordered, the last match wins."
    )

    def obstacle_at(self, site: Site) -> str | None:
        """Return None: what stands at a site and who reads it is seen on the graph."""
        return None


@dataclass(frozen=True)
class Fusion:
    """What a table becomes. units: where its features stand among its outputs, (d,); columns: where each reader finds them.

    columns: (d, places) by reader, a place for every time that the features come in.
    """

    made: Chain
    units: Array
    columns: Mapping[str, Array]

    @property
    def table(self) -> Lookup:
        """The table of r columns."""
        found = self.made.slots[-1]
        assert isinstance(found, Lookup), "looked for"
        return found

    @property
    def rank(self) -> int:
        """How many features are left."""
        return self.table.out_features

    def moved(self, reader: LinearMap, columns: Array) -> LinearMap:
        """Return a reader that does what the matrix did, with what it reads first in each place, and zeros behind it."""
        outer, c = self.made.slots[0], self.made.bias
        assert isinstance(outer, Tensor), "looked for"
        B = outer.detach().double()[torch.from_numpy(self.units)]
        held = last_matrix(reader)
        W, whole = held.detach().double().clone(), reader.dense()
        shift = torch.zeros(reader.out_features, dtype=torch.float64, device=W.device)
        for place in columns.T:
            at = torch.from_numpy(place)
            product = W[:, at] @ B
            W[:, at] = 0
            W[:, at[: self.rank]] = product
            if c is not None:
                shift += whole.weight.double()[:, at] @ c.detach().double()[torch.from_numpy(self.units)]
        new = nn.Parameter(W.to(held.dtype), requires_grad=held.requires_grad)
        made = rebuilt(reader, [*reader.slots[:-1], new]) if isinstance(reader, Chain) else Dense(new, reader.bias)
        if c is None:
            return made
        bias = shift if whole.bias is None else whole.bias.double() + shift
        return made.with_bias(nn.Parameter(bias.to(held.dtype), requires_grad=held.requires_grad))

    def widened(self) -> Lookup:
        """Return the table with as many columns as before, those that go at zero."""
        table = self.table.table.detach()
        whole = table.new_zeros(len(table), self.made.out_features)
        whole[:, torch.from_numpy(self.units[: self.rank])] = table
        return self.table.over(nn.Parameter(whole, requires_grad=self.table.table.requires_grad), None)


@program_pass(FuseTables)
class FuseTablesPass:
    """The two halves of `fuse_tables`."""

    def plan(self, program: Program, session: Session, options: FuseTables, index: int) -> Sequence[Decision]:
        """Find who reads every selected table."""
        groups = find_groups(program)
        return [decide(program, s, groups, options, index) for s in select_sites(program, session, options, index)]

    def apply(
        self, program: Program, session: Session, options: FuseTables, decisions: Sequence[Decision]
    ) -> Sequence[Decision]:
        """Multiply the matrices in, then take the features out that are zero."""
        for decision in session.track(options.type, [d for d in decisions if d.keep is None]):
            (fqn,) = decision.sites
            found = fusion(program, fqn, find_groups(program))
            assert isinstance(found, Fusion), "planning found one"
            for reader, columns in found.columns.items():
                program.replace(reader, found.moved(program.map_of(reader), columns), options.type, settle=False)
            program.replace(fqn, found.widened(), options.type, settle=False)
            program.settle()
            groups = find_groups(program)
            name = next(group.name for group in groups.groups if ("site", fqn, "out") in {m.slot for m in group.members})
            gone = {name: np.arange(found.rank, found.made.out_features)}
            session.notices += [f"fuse_tables: {note}" for note in cut_units(program, groups, gone, options.type)]
        return decisions


def decide(program: Program, selected: Selected, groups: Groups, options: FuseTables, index: int) -> Decision:
    """Return what is to be done with one table; its readers' columns are counted with it."""
    before = summarize(program.map_of(selected.fqn))
    decision = Decision(index, options.type, (selected.fqn,), selected.rule, before, before)
    found = selected.keep or fusion(program, selected.fqn, groups)
    if isinstance(found, str):
        return replace(decision, keep=found)
    after, note = summarize(found.table), f"its matrix goes into {', '.join(found.columns)}"
    for reader, columns in found.columns.items():
        rows = last_matrix(program.map_of(reader)).shape[0]
        before = with_columns(before, rows * columns.size, program.sites[reader])
        after = with_columns(after, rows * found.rank * columns.shape[1], program.sites[reader])
    return replace(decision, before=before, after=after, notes=(note,))


def with_columns(summary: Summary, numbers: int, site: Site) -> Summary:
    """Return the numbers of a map and of columns of a site's matrix."""
    return replace(
        summary, parameters=summary.parameters + numbers, bytes=summary.bytes + numbers * site.dtype.itemsize,
        flops=summary.flops + 2 * numbers,
    )  # fmt: skip


def fusion(program: Program, fqn: str, groups: Groups) -> Fusion | str:
    """Return what a table becomes, or the reason why it stays."""
    made = program.maps.get(fqn)
    if not isinstance(made, Chain) or len(made.slots) != 2 or not isinstance(made.slots[1], Lookup):
        return "no table with a matrix after it"
    if not isinstance(made.slots[0], Tensor) or made.slots[1].bias is not None:
        return f"{made!r} is more than a table and a matrix"
    readers = reached(program, fqn)
    if isinstance(readers, str):
        return readers
    own = ("site", fqn, "out")
    group = next((group for group in groups.groups if own in {member.slot for member in group.members}), None)
    if group is None or group.units != made.out_features:
        return groups.reasons.get(fqn, "its features are tied to others")
    units = next(member.index[:, 0] for member in group.members if member.slot == own)
    others = [member for member in group.members if member.slot != own]
    for member in others:
        if member.slot[2] != "in" or member.site not in readers:
            return f"{member.slot[1]} has the same features"
    return Fusion(made, units, {str(member.site): member.index for member in others}) if others else "no linear reads it"


def reached(program: Program, fqn: str) -> set[str] | str:
    """Return the linears that read what a site gives, or what else reads it."""
    reads = {use.node: name for name, site in program.sites.items() for use in site.uses}
    waiting, found = [program.nodes[use.node] for use in program.sites[fqn].uses], set()
    while waiting:
        for user in waiting.pop().users:
            reader = reads.get(user.name)
            if reader is None and user.op == "call_function" and user.target in MOVES:
                waiting.append(user)
            elif reader is None:
                return f"{user.name} reads its features, which is no linear"
            elif not is_plain(program, reader):
                return f"{reader} reads its features, whose {program.map_of(reader)!r} takes no matrix in"
            else:
                found.add(reader)
    return found


def is_plain(program: Program, fqn: str) -> bool:
    """Say whether a site is a linear that starts with a matrix of its own."""
    made = program.map_of(fqn)
    plain = isinstance(made, Dense) or (isinstance(made, Chain) and isinstance(made.slots[-1], Tensor))
    return plain and isinstance(program.sites[fqn].layout, Rows) and fqn not in program.adapters


def last_matrix(made: LinearMap) -> Tensor:
    """Return the matrix that a plain map applies first."""
    found = made.slots[-1] if isinstance(made, Chain) else made.weight
    assert isinstance(found, Tensor), "a plain map"
    return found
