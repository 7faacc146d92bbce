"""Which sums belong to what a site reads and gives."""

from collections.abc import Callable, Iterable

from torch import Tensor, fx

from lrc.maps import Layout
from lrc.measure.grouped import ExpertMoment, GroupedMoment
from lrc.measure.second_moments import BagCounts, Counts, SecondMoment, Squares
from lrc.measure.taps import Piece, Tap

Source = tuple[fx.Node, Layout | None, tuple[tuple[str, fx.Node], ...]]
Sums = SecondMoment | Counts | BagCounts | GroupedMoment | ExpertMoment


def source(tap: Tap) -> Source:
    """Return what one second moment belongs to: values, and for all but linears how they are read as rows."""
    return tap.reads, None if tap.layout.kind == "linear" else tap.layout, tap.context


def accumulator(tap: Tap) -> Sums:
    """Return sums for what a tap reads: of one-hot vectors, only how often each one came."""
    if tap.layout.kind == "embedding_bag":
        return BagCounts(tap.shape[1])
    if tap.layout.kind == "experts":
        return ExpertMoment(tap.layout.groups, tap.shape[1])
    if tap.layout.groups > 1:
        return GroupedMoment(tap.layout.groups, tap.shape[1])
    return Counts(tap.shape[1]) if tap.layout.looked_up else SecondMoment(tap.shape[1])


def output_sums(tap: Tap, *, joint: bool) -> SecondMoment | Squares | ExpertMoment:
    """Return sums for the gradients of what a tap gives: of a head that shares a table, only the squares."""
    if tap.layout.kind == "experts":
        return ExpertMoment(tap.layout.groups, tap.shape[0] // tap.layout.groups, each=True)
    return Squares(tap.shape[0]) if joint and not tap.layout.looked_up else SecondMoment(tap.shape[0])


def add_piece(sums: Sums, piece: Piece, weight: float = 1.0, squares: Tensor | None = None) -> None:
    """Add rows, each weighed by the gradient of its output, if given: `squares`, of all outputs."""
    weights = None if squares is None else squares[piece.place]
    if isinstance(sums, BagCounts):
        assert piece.entries is not None, "bags are read by their entries"
        sums.add(piece.entries, weight, weights)
    elif isinstance(sums, ExpertMoment):
        assert piece.owners is not None, "rows belong to experts"
        sums.add(piece.rows, weight, weights, piece.owners)
    else:
        sums.add(piece.rows, weight, weights)


def add_output(
    sums: SecondMoment | Squares | ExpertMoment, rows: Tensor, weight: float, pieces: Callable[[], Iterable[Piece]]
) -> None:
    """Add the gradients of what a tap gives. pieces: of what it reads, which tell whose rows they are."""
    if not isinstance(sums, ExpertMoment):
        sums.add(rows, weight)
        return
    for piece in pieces():
        assert piece.owners is not None, "rows belong to experts"
        sums.add(rows[piece.place], weight, None, piece.owners)
