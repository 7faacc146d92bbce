"""Moments of a weight that a head multiplies and an embedding looks up: one Kronecker product for both uses."""

from collections.abc import Sequence

from torch import Tensor

from lrc.errors import SiteError
from lrc.program import Site
from lrc.solvers import Moments, Need
from lrc.solvers.kronecker import joined


def joint_moments(
    inputs: tuple[Tensor, Tensor], rows: int, head: Tensor | None, counts: Tensor | None, embedding: Tensor | None
) -> Moments:
    """Return moments in which rows of the weight are outputs: `fisher` is a diagonal, (rows,), `gram` (columns, columns).

    inputs: the head's E[h hᵀ] and E[h], over `rows` tokens; head: its E[g_v²], (rows,); counts: how often a row is looked up
    a token, (rows,); embedding: E[g gᵀ] where it is. The loss's increase is in second order half of
    sum over rows v of dW_v (E[g_v²] E[h hᵀ] + counts_v E[g gᵀ]) dW_vᵀ, with the outputs of the head taken for uncorrelated.
    Without gradients the head's inputs decide alone.
    """
    gram, mean = inputs
    if head is None or counts is None or embedding is None:
        return Moments(gram=gram, mean=mean, tokens=rows)
    fisher, gram = joined([(head, gram), (counts, embedding)])
    return Moments(gram=gram, fisher=fisher, tokens=rows)


def refuse_samples(sites: Sequence[Site], needs: frozenset[Need]) -> None:
    """Raise SiteError for a solver that measures such a weight sample by sample."""
    for site in sites:
        if site.joint and not needs.isdisjoint({Need.MAGNITUDES, Need.WEIGHT_FISHER}):
            raise SiteError(
                site.fqn, message="a weight that an embedding shares is not measured sample by sample",
                hint="Choose `kfac`, `whitened` or `svd`, or `tied: keep`",
            )  # fmt: skip
