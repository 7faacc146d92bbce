"""What the data-aware solvers share: their options, the moment that they whiten with, and the target they fit."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Moments, SolverOptions
from lrc.solvers.ladder import root, symmetric


class InputsOptions(SolverOptions):
    """Options of a solver that whitens with the layer's inputs."""

    center: bool | Literal["auto"] = Field(
        default="auto",
        description="Weigh deviations from the mean input and let the bias carry the mean of what is dropped; "
        "auto: where the layer has a bias, so that none is added.",
    )
    propagate: Literal["dense", "compressed"] = Field(
        default="dense", description="Whose inputs a layer is fitted on: the dense model's, or the compressed one's."
    )
    blend: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="With `propagate: compressed`, the share of the target that makes up for the changed inputs.",
    )


def centers(options: InputsOptions, bias: Tensor | None) -> bool:
    """Return whether the mean is taken out."""
    return bias is not None if options.center == "auto" else options.center


def input_moment(moments: Moments, center: bool) -> Tensor:
    """Return E[x xᵀ], or the covariance E[x xᵀ] - E[x] E[x]ᵀ, float64 (in_features, in_features).

    Raises SolverError where a statistic is missing.
    """
    if moments.gram is None:
        raise SolverError("moments.gram", expected="the second moment of the inputs", got="none")
    gram = moments.gram.double() if moments.gram.ndim == 1 else symmetric(moments.gram)
    if not center:
        return gram
    if gram.ndim == 1:
        raise SolverError("center", message="the covariance of one-hot inputs is not diagonal", hint="Set `center: false`")
    mean = input_mean(moments)
    return gram - mean[:, None] * mean


def input_mean(moments: Moments) -> Tensor:
    """Return E[x] in float64. Raises SolverError where it was not measured."""
    if moments.mean is None:
        raise SolverError("moments.mean", expected="the mean input", got="none", hint="Set `center: false`.")
    return moments.mean.double()


def output_mean(weight: Tensor, moments: Moments) -> Tensor:
    """Return the dense layer's mean output without its bias, float64 (out_features,)."""
    mean = input_mean(moments) if moments.dense_mean is None else moments.dense_mean.double()
    return weight.double() @ mean


def cross_moment(moments: Moments, center: bool) -> Tensor | None:
    """Return E[x x̃ᵀ], or its centred form, float64; None where inputs were not propagated."""
    if moments.cross is None:
        return None
    cross = moments.cross.double()
    if not center:
        return cross
    dense_mean = input_mean(moments) if moments.dense_mean is None else moments.dense_mean.double()
    return cross - dense_mean[:, None] * input_mean(moments)


def propagated_target(weight: Tensor, moments: Moments, blend: float, damping: float = 1e-3, *, center: bool = False) -> Tensor:
    """Return the weight to fit where the layer will see the inputs of an already compressed model.

    W* = W E[x x̃ᵀ] (C̃ + damping * mean(diag C̃) I)⁻¹ maps the changed inputs x̃ to the dense layer's outputs; the result
    is blend W* + (1 - blend) W, because W* alone over-fits small calibration sets (methods/kfac_pivoted.md, measured).
    Without `moments.cross` the result is W. float64 (out_features, in_features).
    Source: the least squares of Wang et al. (2025), SVD-LLM, arXiv:2403.07378, on second moments in place of samples.
    """
    cross = cross_moment(moments, center)
    W = weight.double()
    if cross is None or blend == 0:
        return W
    L = root(input_moment(moments, center), "gram", damping)
    if L.weight == 0:
        return W
    return blend * L.divide(W @ cross) + (1 - blend) * W
