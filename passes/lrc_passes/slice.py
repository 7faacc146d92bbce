"""slice: the residual stream gets fewer features (SliceGPT).

%x: f32[.., d];  %h = norm(%x);        %y = up(%h);   …  %z = down(%v);   %x' = add(%x, %z)
%x: f32[.., k];  %h = x / rms(%x);     %y = up'(%h);  …  %z = down'(%v);  %x' = add(%x, %z)          bases: shared
                                                                          %x' = add(Q' Qᵀ %x, %z)    bases: block

A norm's gain goes into the linears that read it, the mean that a LayerNorm takes off into those that write before it; what
is left commutes with every rotation of the stream. So the stream is turned into its principal directions on the calibration
data, and the weakest ones are deleted: rows of all that writes, columns of all that reads. This is a graph-level pass of its
own, no solver of `factorize`: no weight is approximated by a product, and every site gets another shape at once.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrc.errors import UsageError
from lrc.maps import Chain, Dense, LinearMap, Lookup
from lrc.measure import digest
from lrc.measure.stream import stream_moments
from lrc.program import Program, Site
from lrc.program.narrow import narrow_stream
from lrc.program.residual import Stream, find_stream
from lrc.ranks import FixedRank, FractionRank, ParamsKept, RankField
from lrc.run import Decision, PassOptions, Session, program_pass
from lrc.run.selection import Selected, select_sites
from lrc.run.summary import summarize
from lrc.solvers import Need
from lrc.solvers.rotation import directions, rotated_reader, rotated_writer
from lrc_passes.slice_sizes import STREAM, Sizes, chosen_width, keeps_table

UNIT = "share of the stream's energy"


class Slice(PassOptions):
    """Delete the weakest directions of the residual stream."""

    type: Literal["slice"] = "slice"
    rank: RankField = Field(
        description="Features that the stream keeps: a whole number, {fraction: …}, or {params_kept: …} of the targets, the "
        "matrices between bases counted."
    )
    round_to: int = Field(default=8, ge=1, description="The kept features are a multiple of this.")
    bases: Literal["shared", "block"] = Field(
        default="shared",
        description="One basis for the whole stream (runs in the model's own modules), or one before every block, as SliceGPT "
        "has it, with a matrix in every residual connection (runs as a graph).",
    )
    signals: Literal["normalized", "residual"] = Field(
        default="normalized", description="Whose directions are kept: what the norms give, or the stream itself."
    )
    tied: Literal["keep", "untie"] = Field(
        default="keep",
        description="A table that the head shares: leave it whole, with a small matrix beside it on either side, or cut a copy "
        "for each.",
    )
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def grafts(self) -> bool:
        """Say whether the result has a place in the user's own modules."""
        return self.bases == "shared"

    @model_validator(mode="after")
    def _rank_of_the_stream(self) -> Self:
        if not isinstance(self.rank, FixedRank | FractionRank | ParamsKept):
            (policy,) = type(self.rank).model_fields
            raise ValueError(
                f"`slice` takes a whole number, {{fraction: …}} or {{params_kept: …}}, not `rank: {{{policy}: …}}`"
            )
        return self


@program_pass(Slice)
class SlicePass:
    """The pass. The decisions are one for every site that the stream runs through, all of one width."""

    def plan(self, program: Program, session: Session, options: Slice, index: int) -> Sequence[Decision]:
        """Find the stream and choose its width."""
        stream = checked_stream(program, options, session.where(index))
        selected = {s.fqn: s for s in select_sites(program, session, options, index)}
        sizes = Sizes(program, stream, options)
        touched = sizes.touched
        ignored = [fqn for fqn in touched if fqn in selected and (selected[fqn].keep or "").startswith("ignored")]
        if ignored:
            raise UsageError(ignored[0], message="the residual stream runs through it", hint="Take it out of `ignore`")
        counted = [fqn for fqn in selected if not (selected[fqn].keep or "").startswith("ignored")]
        width = chosen_width(sizes, counted, options)
        if width >= stream.width and not isinstance(options.rank, FixedRank):
            reason = "the budget takes the stream as it is"
            return [kept(program, index, s, reason) for s in selected.values()]
        _, shares = bases_of(program, session, stream, options)
        others = [fqn for fqn in touched if fqn not in selected]
        if others:
            session.notices.append(
                f"slice: {len(others)} sites beside the targets lie on the stream and are cut too: {listed(others)}"
            )
        made = []
        for fqn in [*selected, *others]:
            chosen = selected.get(fqn, Selected(fqn, STREAM))
            if fqn not in touched:
                made.append(kept(program, index, chosen, chosen.keep or "it does not touch the residual stream"))
                continue
            basis = stream.readers.get(fqn, stream.writers.get(fqn, 0))
            dropped = float(shares[basis][width:].sum())
            before = summarize(program.sites[fqn].map)
            made.append(
                Decision(
                    index, options.type, (fqn,), chosen.rule, before, sizes.after(fqn, width), rank=width,
                    full_rank=stream.width, predicted=dropped, unit=UNIT,
                )
            )  # fmt: skip
        return made

    def apply(self, program: Program, session: Session, options: Slice, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Cut every weight, and the graph."""
        work = [d for d in decisions if d.keep is None]
        if not work:
            return decisions
        width = work[0].rank
        assert width is not None, "a slice has a width"
        stream = checked_stream(program, options, options.type)
        rotations, _ = bases_of(program, session, stream, options)
        cut = [Q[:, :width] for Q in rotations]
        maps = {fqn: sliced(program, stream, fqn, cut, options) for fqn in Sizes(program, stream, options).touched}
        maps |= {module: sliced_table(program, stream, module, cut, options) for module in stream.embeddings}
        dtype = next(iter(maps.values())).dtype
        pairs = {(s.before, s.after) for s in stream.shortcuts if options.bases == "block"}
        shortcuts = {(a, b): Dense((cut[b].T @ cut[a]).to(dtype).contiguous()) for a, b in pairs}
        narrow_stream(program, stream, width, maps, shortcuts)
        return decisions


def checked_stream(program: Program, options: Slice, where: str) -> Stream:
    """Return the stream, in one basis if so asked. Raises UsageError for one that this pass cannot cut."""
    stream = find_stream(program)
    changed = [
        fqn
        for fqn in {**stream.readers, **stream.writers}
        if fqn in program.maps and not isinstance(program.maps[fqn], Dense | Lookup)
    ]
    if changed:
        raise UsageError(
            where,
            message=f"{changed[0]} is {program.maps[changed[0]]!r} already",
            hint="Put `slice` before the passes that factorize",
        )
    if len({norm.centers for norm in stream.norms}) > 1:
        raise UsageError(where, message="some norms of the residual stream take the mean off and some do not")
    return stream if options.bases == "block" else stream.in_one_basis()


def bases_of(program: Program, session: Session, stream: Stream, options: Slice) -> tuple[list[Tensor], list[Tensor]]:
    """Return the directions of every basis, (width, width), and their shares of the energy; what was measured is cached."""
    key = digest(
        "stream-1", program.digest(), list(session.batches), options.signals, torch.__version__, torch.get_num_threads()
    )
    stored = session.cache.get(key)
    if stored is None:
        found = stream_moments(program, stream, session.batches, normalized=options.signals == "normalized")
        stored = {str(place): moment for place, moment in enumerate(found)}
        session.cache.put(key, stored)
    made = [directions(torch.stack([stored[str(place)] for place in places]).sum(0)) for places in stream.bases]
    return [Q for Q, _ in made], [shares for _, shares in made]


def sliced(program: Program, stream: Stream, fqn: str, cut: Sequence[Tensor], options: Slice) -> LinearMap:
    """Return the map of a reader, a writer, or both, in the kept directions (width, kept) of every basis."""
    site = program.sites[fqn]
    weight, bias = site.map.exact()
    tensors = program.tensors()
    if fqn in stream.readers:
        norm = stream.norms[stream.norm_of[fqn]]
        gain, shift = (None if name is None else tensors[name].detach() for name in (norm.weight, norm.bias))
        Q = cut[stream.readers[fqn]]
        if keeps_table(site, stream, options):
            _, bias = rotated_reader(weight, bias, gain, shift, Q)
            A = Q if gain is None else gain.double()[:, None] * Q
            return Chain(tensors[site.weight_name], A.to(site.dtype).contiguous(), bias=as_dtype(bias, site))
        weight, bias = rotated_reader(weight, bias, gain, shift, Q)
    if fqn in stream.writers:
        weight, bias = rotated_writer(weight, bias, cut[stream.writers[fqn]], centers=stream.norms[0].centers)
    if site.kind == "embedding":
        return Lookup(weight.T.to(site.dtype).contiguous(), padding_of(site.map), as_dtype(bias, site))
    return Dense(weight.to(site.dtype).contiguous(), as_dtype(bias, site))


def sliced_table(program: Program, stream: Stream, module: str, cut: Sequence[Tensor], options: Slice) -> LinearMap:
    """Return the map of an embedding whose table the head shares."""
    node, basis = stream.embeddings[module]
    found = program.nodes[node]
    table = program.tensors()[program.names.canonical[str(found.args[0].target)]]  # type: ignore[union-attr]  # a node
    given = found.args[2] if len(found.args) > 2 else -1
    padding = given if isinstance(given, int) and given >= 0 else None
    weight, _ = rotated_writer(torch.eye(stream.width), None, cut[basis], centers=stream.norms[0].centers)
    if options.tied == "keep":
        return Chain(weight.to(table.dtype).contiguous(), Lookup(table, padding))
    return Lookup((table.detach().double() @ weight.T).to(table.dtype).contiguous(), padding)


def kept(program: Program, index: int, chosen: Selected, reason: str) -> Decision:
    """Return the decision of a site that stays as it is."""
    before = summarize(program.sites[chosen.fqn].map)
    return Decision(index, "slice", (chosen.fqn,), chosen.rule, before, before, keep=reason)


def as_dtype(bias: Tensor | None, site: Site) -> Tensor | None:
    """Return a bias in the dtype of a site."""
    return None if bias is None else bias.to(site.dtype)


def padding_of(made: LinearMap) -> int | None:
    """Return the padding row of a table."""
    return made.padding_index if isinstance(made, Lookup) else None


def listed(fqns: Sequence[str]) -> str:
    """Return up to three names."""
    return ", ".join(fqns[:3]) + (", …" if len(fqns) > 3 else "")
