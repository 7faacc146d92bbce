"""What slicing a residual stream does to numbers: its directions, and the weights that write into it and read from it."""

import torch
from torch import Tensor

from lrc.solvers.ladder import symmetric


def directions(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal directions of a second moment as columns, (n, n), the strongest first, and their shares, (n,).

    moment: (n, n), symmetric up to rounding; computed in float64. The shares add up to 1 (or are 0 for a zero moment). The
    largest entry of every direction is positive, so that the result does not hang on the eigensolver's signs.
    Source: Ashkboos et al. (2024), SliceGPT, arXiv:2401.15024, section 3.3. Departure: their damping of the diagonal is
    left out, since it changes no eigenvector.
    """
    values, vectors = torch.linalg.eigh(symmetric(moment))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.abs().argmax(0)
    signs = vectors.gather(0, largest[None])[0].sign()
    total = values.sum()
    return vectors * signs, values / total if float(total) > 0 else values


def rotated_reader(
    weight: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, Q: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the weight (out, kept) and bias that give weight (gain * Q z + shift) + bias for z in the basis Q, float64.

    weight: (out, n). gain, shift: (n,), those of the norm before it, or None. Q: (n, kept).
    """
    W = weight.double()
    if shift is not None:
        moved = W @ shift.double()
        bias = moved if bias is None else bias.double() + moved
    if gain is not None:
        W = W * gain.double()
    return W @ Q, bias


def rotated_writer(weight: Tensor, bias: Tensor | None, Q: Tensor, *, centers: bool) -> tuple[Tensor, Tensor | None]:
    """Return the weight (kept, in) and bias whose output is that of weight (n, in) and bias in the basis Q (n, kept), float64.

    centers: the mean over the n outputs is taken off first, as the LayerNorms that read them would.
    """
    W, b = weight.double(), None if bias is None else bias.double()
    if centers:
        W = W - W.mean(0)
        b = None if b is None else b - b.mean()
    return Q.T @ W, None if b is None else Q.T @ b
