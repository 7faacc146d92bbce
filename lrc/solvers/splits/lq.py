"""LQ-LoRA and LoftQ: a quantised weight plus the low-rank product that its rounding leaves over, by turns."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.formats import Encoded, FormatField, NormalFloat, NumberFormat
from lrc.solvers.base import Moments, Need
from lrc.solvers.splits.base import QuantizedOptions, Split, splitter
from lrc.solvers.splits.bits import BitsField
from lrc.solvers.splits.low_rank import LowRank, balanced_factors, leading_columns

CANDIDATES: tuple[NumberFormat, ...] = (
    NormalFloat(bits=2, scale_bits=2, block=16, super_block=16, scale_dtype="bfloat16"),
    *(NormalFloat(bits=bits, block=block) for bits in (2, 3, 4, 8) for block in (32, 64)),
)
FLOOR = 1e-5  # of the largest row or column weight
STEPS = 2  # warm steps of a turn: one lags behind the exact SVDs where bits are few


class LqSplitter(QuantizedOptions):
    """Low-rank first, then the rest in few bits; the best of all iterations."""

    type: Literal["lq"] = "lq"
    bits: BitsField = Field(
        default=None,
        description="Choose each site's format under one budget, in place of `format`: bits a number on average over all rests "
        "(2.75), or {size_mb: …}, of the whole model.",
    )
    formats: list[FormatField] = Field(
        default=list(CANDIDATES), min_length=1, description="The formats to choose among, where `bits` is given."
    )
    weights: Literal["none", "fisher"] = Field(
        default="none", description="fisher: weigh errors by the Fisher information of the entries (needs gradients)."
    )
    iterations: int = Field(default=100, ge=1, description="At most so many; it stops when the error grows.")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # it depends on an option
        """Per-entry Fisher information for `weights: fisher`."""
        return frozenset({Need.WEIGHT_FISHER}) if self.weights == "fisher" else frozenset()


class LoftqSplitter(QuantizedOptions):
    """The weight in few bits first, then the product for what rounding took away."""

    type: Literal["loftq"] = "loftq"
    iterations: int = Field(default=1, ge=1, description="Turns of a quantised and a low-rank step.")
    needs: ClassVar[frozenset[Need]] = frozenset()


@splitter(LqSplitter)
def lq(weight: Tensor, moments: Moments, rank: int, options: LqSplitter, generator: torch.Generator) -> Split:
    """Return B A + Q, Q in the format, that brings ||sqrt(F) o (W - B A - Q)||_F down; F = 1 without Fisher information.

    Each turn fits B A to W - Q (with F, between the square roots of its row and column means: exact where F has rank one), the
    first by an SVD, the others by steps from the turn before, then rounds W - B A. Stops when the error grows and returns the
    best turn. Computed in float64.
    Raises SolverError where Fisher information is asked for and was not measured.
    Source: Guo et al. (2024), LQ-LoRA, arXiv:2311.12023. Departures: no randomized SVDs; the best turn, not the last.
    """
    W = weight.double()
    rows, columns, entries = fisher_scales(moments, weight) if options.weights == "fisher" else (None, None, None)
    left, right = (torch.ones(1, dtype=W.dtype) if scale is None else scale for scale in (rows, columns))
    follow = LowRank(min(rank, *W.shape), STEPS)
    Q = torch.zeros_like(W)
    best: tuple[Tensor, Tensor, Encoded] | None = None
    history: list[float] = []
    for _ in range(options.iterations):
        B, A = follow.factors(left[:, None] * (W - Q) * right)
        B, A = B / left[:, None], A / right
        encoded = options.format.encode(W - B @ A)
        Q = options.format.decode(encoded, shape_of(weight)).double()
        gap = W - B @ A - Q
        history.append(float((gap if entries is None else entries * gap).norm()))
        if best is not None and history[-1] > history[-2]:
            break
        best = (B, A, encoded)
    assert best is not None, "there is at least one iteration"
    B, A, encoded = best
    B, A = balanced_factors(left[:, None] * B, A * right, torch.float64)
    return _split(weight, B / left[:, None], A / right, encoded, options.format, history, entries)


@splitter(LoftqSplitter)
def loftq(weight: Tensor, moments: Moments, rank: int, options: LoftqSplitter, generator: torch.Generator) -> Split:
    """Return Q + B A: by turns Q is W - B A rounded, from B A = 0, and B A the best product of rank `rank` for W - Q.

    Computed in float64; data is not looked at.
    Source: Li et al. (2024), LoftQ, arXiv:2310.08659.
    """
    W = weight.double()
    B, A = W[:, :0], W[:0]
    encoded: Encoded = {}
    history: list[float] = []
    for _ in range(options.iterations):
        encoded = options.format.encode(W - B @ A)
        Q = options.format.decode(encoded, shape_of(weight)).double()
        B, A = low_rank(W - Q, rank)
        history.append(float((W - Q - B @ A).norm()))
    return _split(weight, B, A, encoded, options.format, history[-1:], None)


def low_rank(X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B, A of the best product of a rank, the singular values shared between them."""
    Q = leading_columns(X, min(rank, *X.shape)) if rank else X[:, :0]
    return balanced_factors(Q, Q.T @ X, torch.float64)


def fisher_scales(moments: Moments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the roots of the row means (out_features,) and column means (in_features,) of the Fisher, and of its entries.

    Rows and columns without information get the least weight that the others leave visible. Raises SolverError where it was
    not measured, or is zero everywhere.
    """
    fisher = moments.weight_fisher
    if fisher is None or float(fisher.max()) <= 0:
        got = "none" if fisher is None else "zero everywhere"
        hint = "Give `calibration` data that the loss depends on, or set `weights: none`"
        raise SolverError("moments.weight_fisher", expected="Fisher information", got=got, hint=hint)
    rows, columns = fisher.double().mean(1).sqrt(), fisher.double().mean(0).sqrt()
    rows, columns = rows.clamp(min=FLOOR * float(rows.max())), columns.clamp(min=FLOOR * float(columns.max()))
    return rows, columns, fisher.double().sqrt()


def shape_of(weight: Tensor) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    return weight.shape[0], weight.shape[1]


def _split(
    weight: Tensor,
    B: Tensor,
    A: Tensor,
    encoded: Encoded,
    form: NumberFormat,
    history: list[float],
    entries: Tensor | None,
) -> Split:
    W = weight.double()
    whole = float((W if entries is None else entries * W).norm())
    least = min(history)
    return Split(
        B.to(weight.dtype), A.to(weight.dtype), form.decode(encoded, shape_of(weight)).to(weight.dtype), None,
        least / whole if whole else 0.0, tuple(history), encoded=encoded, loss=least**2,
    )  # fmt: skip


def plain_error(weight: Tensor, form: NumberFormat) -> float:
    """Return ||W - Q||_F over ||W||_F of plain rounding."""
    whole = float(weight.norm())
    return float((weight - form.rounded(weight)).norm()) / whole if whole else 0.0
