"""One Kronecker product in place of a sum of several: what a weight that is used in two ways is measured with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return (d, M) of which d ⊗ M has both partial traces of the sum of d_i ⊗ M_i.

    d_i: a diagonal, (rows,), non-negative; M_i: positive semi-definite, (columns, columns). With p_i = sum(d_i) and
    q_i = tr(M_i), d = sum of q_i d_i and M = sum of p_i M_i / sum of p_i q_i; exact where there is one term, or where either
    factor is the same in all up to its scale. A sum of zero is returned as zeros. float64.
    """
    masses = [(float(d.double().sum()), float(M.double().trace())) for d, M in terms]
    total = sum(p * q for p, q in masses)
    diagonal = sum((q * d.double() for (d, _), (_, q) in zip(terms, masses, strict=True)), torch.zeros(()))
    matrix = sum((p * M.double() for (_, M), (p, _) in zip(terms, masses, strict=True)), torch.zeros(()))
    return diagonal, matrix / total if total > 0 else matrix
