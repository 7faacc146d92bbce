"""Principal component pursuit: the convex split into low rank and sparse, whose rank and support it finds itself."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Moments
from lrc.solvers.splits.base import SparseOptions, Split, splitter
from lrc.solvers.splits.low_rank import balanced_factors
from lrc.solvers.splits.support import Pattern, block_of, strongest

STEP = 1.5  # growth of the penalty an iteration, inexact augmented Lagrangian


class PcpSplitter(SparseOptions):
    """Robust PCA. The pass's `rank` and the `density` are upper bounds; what lies beyond them is cut off, with a note."""

    type: Literal["pcp"] = "pcp"
    density: float | None = Field(default=1.0, ge=0, le=1, description="Largest share of the entries in the sparse part.")
    pattern: Pattern = Field(default="all", description="Where the sparse part may stand once it is cut.")
    sparsity_weight: float | None = Field(
        default=None, gt=0, description="Weight of the entries' sum against the nuclear norm; null: 1 / sqrt(larger side)."
    )
    iterations: int = Field(default=500, ge=1, description="At most so many.")
    tolerance: float = Field(default=1e-7, gt=0, description="Relative error of the constraint at which it stops.")


@splitter(PcpSplitter)
def pcp(weight: Tensor, moments: Moments, rank: int, options: PcpSplitter, generator: torch.Generator) -> Split:
    """Return the L and S of least ||L||_* + lambda ||S||_1 with L + S = W, cut to `rank` and `density`.

    Computed in float64 by the inexact augmented Lagrangian method with a full SVD an iteration. Trained weights are not
    sparse plus low-rank, so expect cuts there. A note says where the iterations did not suffice.
    Source: Candès, Li, Ma & Wright (2011), doi:10.1145/1970392.1970395; Lin, Chen & Ma (2010), arXiv:1009.5055.
    """
    W = weight.double()
    whole = float(W.norm())
    if whole == 0:
        return Split(weight[:, :0], weight[:0], weight.clone(), torch.zeros_like(weight, dtype=torch.bool), 0.0)
    lam = options.sparsity_weight or max(weight.shape) ** -0.5
    largest = float(torch.linalg.matrix_norm(W, 2))
    Y = W / max(largest, float(W.abs().max()) / lam)
    mu = 1.25 / largest
    S = torch.zeros_like(W)
    L = S
    history: list[float] = []
    for _ in range(options.iterations):
        U, sigma, Vh = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
        L = U * (sigma - 1 / mu).clamp(min=0) @ Vh
        S = _shrunk(W - L + Y / mu, lam / mu)
        gap = W - L - S
        Y, mu = Y + mu * gap, min(mu * STEP, 1e7 / largest)
        history.append(float(gap.norm()) / whole)
        if history[-1] <= options.tolerance:
            break
    notes = [] if history[-1] <= options.tolerance else [f"constraint met to {history[-1]:.1e} after {len(history)} iterations"]
    U, sigma, Vh = torch.linalg.svd(L, full_matrices=False)
    found = int((sigma > 1e-9 * sigma[0]).sum()) if float(sigma[0]) else 0
    kept = min(found, rank)
    if found > kept:
        notes.append(f"rank {found} cut to {kept}")
    inside = S != 0
    support = strongest(S.abs(), options.pattern, 1.0 if options.density is None else options.density)
    support = support if block_of(options.pattern) else support & inside  # a block is kept whole
    if int((support & inside).sum()) < int(inside.sum()):
        notes.append(f"{int(inside.sum())} sparse entries cut to {int((support & inside).sum())}")
    B, A = balanced_factors(U[:, :kept], sigma[:kept, None] * Vh[:kept], torch.float64)
    rest = torch.where(support, S, 0.0)
    error = float((W - B @ A - rest).norm()) / whole
    return Split(B.to(weight.dtype), A.to(weight.dtype), rest.to(weight.dtype), support, error, tuple(history), tuple(notes))


def _shrunk(X: Tensor, threshold: float) -> Tensor:
    return X.sign() * (X.abs() - threshold).clamp(min=0)
