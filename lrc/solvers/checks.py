"""What every solver refuses: statistics that are missing, of the wrong shape or not finite."""

import math

import torch
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Moments, Need

NEEDED = {Need.INPUTS: "gram", Need.GRADIENTS: "fisher", Need.WEIGHT_FISHER: "weight_fisher"}


def check(weight: Tensor, bias: Tensor | None, moments: Moments, max_rank: int, needs: frozenset[Need]) -> None:
    """Raise SolverError where `weight`, `bias` or a statistic cannot be used; the text names it and says what is wrong."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise SolverError("weight", expected="a matrix with rows and columns", got=f"shape {tuple(weight.shape)}")
    if max_rank < 1:
        raise SolverError("max_rank", expected="at least 1", got=str(max_rank))
    out_features, in_features = weight.shape
    check_finite("weight", weight)
    if bias is not None:
        check_tensor("bias", bias, (out_features,))
    for need in sorted(needs):
        if getattr(moments, NEEDED[need]) is None:
            raise SolverError(
                f"moments.{NEEDED[need]}",
                expected=f"the {need.value} that this solver needs",
                got="none",
                hint="Give `calibration` data, or choose the solver `svd`, which needs none.",
            )
    shapes = {
        "gram": (in_features, in_features),
        "mean": (in_features,),
        "fisher": (out_features, out_features),
        "weighted_gram": (in_features, in_features),
        "weighted_mean": (in_features,),
        "cross": (in_features, in_features),
        "dense_mean": (in_features,),
        "weight_fisher": (out_features, in_features),
    }
    for name, shape in shapes.items():
        statistic = getattr(moments, name)
        if statistic is not None:
            check_tensor(f"moments.{name}", statistic, shape)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise SolverError where `tensor` is not of `shape` or not finite."""
    if tuple(tensor.shape) != shape:
        raise SolverError(name, expected=f"shape {shape}", got=f"shape {tuple(tensor.shape)}")
    check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise SolverError that counts the NaN and infinite values of `tensor`, if there are any."""
    if tensor.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):  # one pass, no temporary
        finite = torch.isfinite(tensor)
        nan = int(torch.isnan(tensor).sum())
        infinite = int((~finite).sum()) - nan
        raise SolverError(
            name,
            expected="finite numbers",
            got=f"{nan} NaN and {infinite} infinite of {tensor.numel()} values",
            hint="The checkpoint is damaged, or the model overflows in its dtype on the calibration data.",
        )
