"""Rounding that looks at the inputs: scales that fit the numbers, and every column making up for the errors before it."""

import torch
from torch import Tensor

from lrc.formats import Encoded, NumberFormat
from lrc.solvers.ladder import symmetric

BLOCK = 64  # columns between two updates of all that follow
SHRINKS = torch.linspace(1.0, 0.4, 13).tolist()  # of the largest magnitude of a block


class Feedback:
    """Rounding for inputs of one second moment C (in_features, in_features), positive definite (damped).

    What depends on C alone is computed once, in float64, for any number of weights and formats.
    """

    def __init__(self, gram: Tensor) -> None:
        C = symmetric(gram)
        self.diagonal = C.diagonal()
        self.order = self.diagonal.argsort(descending=True, stable=True)
        self.upper = inverse_root(C[self.order][:, self.order])

    def encode(self, weight: Tensor, form: NumberFormat, weights: Tensor | None = None) -> Encoded:
        """Return the weight in a format, rounded column by column such that tr(E C Eᵀ), E the error, stays small.

        weight: (out_features, in_features). weights: see `fitted_scales`, the diagonal of C without it. The error of a column
        is made up for by all that come later, in closed form; columns of large inputs come first. Scales are those of
        `fitted_scales` and stay. Computed in float64.
        Source: Frantar et al. (2023), GPTQ, arXiv:2210.17323, algorithm 1, with its order by activations. Departure: scales are
        fitted to the weight before anything is rounded, so that the order of columns is free whatever the blocks are.
        """
        rows, columns = shape = (weight.shape[0], weight.shape[1])
        stored = form.store_scales(fitted_scales(weight, form, self.diagonal if weights is None else weights), shape)
        scales = form.spread_scales(stored, shape).double().T[self.order].contiguous()
        left = weight.double().T[self.order].contiguous()  # (in_features, out_features): what each column is still to be
        safe = torch.where(scales > 0, scales, torch.ones_like(scales))
        levels, upper = form.levels.to(left), self.upper
        edges = (levels[1:] + levels[:-1]) / 2
        places = torch.empty(columns, rows, dtype=torch.int64, device=left.device)
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            errors = left.new_empty(stop - start, rows)
            for j in range(start, stop):
                places[j] = torch.bucketize(left[j] / safe[j], edges)
                error = torch.sub(left[j], levels[places[j]] * scales[j], out=errors[j - start]).div_(upper[j, j])
                left[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1.0)
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
        return form.with_codes(stored, places[self.order.argsort()].T.contiguous())


def fitted_scales(weight: Tensor, form: NumberFormat, weights: Tensor) -> Tensor:
    """Return the scale of every block, (blocks,), of the least weighed squared error among shares of its largest magnitude.

    weights: positive, for columns (in_features,) or for entries, of the shape of `weight`. With few bits a scale that clips
    the largest numbers serves the others better.
    """
    blocks = form.in_blocks(weight.float())
    worth = form.in_blocks(weights.float().expand(weight.shape).contiguous())
    largest = blocks.abs().amax(1) / form.levels[-1].item()
    levels = form.levels.to(blocks)
    best, chosen = torch.full_like(largest, torch.inf), largest
    for share in SHRINKS:
        scales = share * largest
        rounded = levels[form.nearest(blocks, scales[:, None])] * scales[:, None]
        error = (blocks - rounded).square_().mul_(worth).sum(1)
        chosen = torch.where(error < best, scales, chosen)
        best = torch.minimum(best, error)
    return chosen


def inverse_root(C: Tensor) -> Tensor:
    """Return the upper triangular U with UᵀU = C⁻¹, C symmetric and positive definite, float64."""
    flipped = torch.linalg.cholesky(C.flip(0, 1)).flip(0, 1)  # upper triangular, and C is this times its transpose
    unit = torch.eye(len(C), dtype=C.dtype, device=C.device)
    found: Tensor = torch.linalg.solve_triangular(flipped, unit, upper=True)
    return found
