"""Products that a kernel computes in one pass on a GPU: two factors, and a packed weight with a product beside it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lrc.kernels import quantized_linear, runs_quantized, runs_two_factor, two_factor_linear
from lrc.maps.base import LinearMap, Slot
from lrc.maps.quantized import Quantized


def chain_by_kernel(slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return what a chain of these slots gives where a kernel for two factors runs it, else None."""
    pair = bare(slots)
    if pair is None or not runs_two_factor(x, *pair):
        return None
    y: Tensor = two_factor_linear(x, *pair, bias)
    return y


def sum_by_kernel(slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return what the sum of a packed weight and a product gives where one kernel runs both, else None."""
    packed = next((slot for slot in slots if isinstance(slot, Quantized) and slot.bias is None), None)
    if packed is None or len(slots) != 2 or not runs_quantized(x, packed.form, packed.shape):
        return None
    pair = factors(slots[1] if slots[0] is packed else slots[0])
    if pair is None or not runs_quantized(x, packed.form, packed.shape, pair[0].shape[0]):
        return None
    y = quantized_linear(x, packed.encoded, packed.form, packed.out_features, *pair)
    return y if bias is None else y + bias


def bare(slots: Sequence[Slot]) -> tuple[Tensor, Tensor] | None:
    """Return A and B where the slots are the two matrices of a product, else None."""
    if len(slots) != 2:
        return None
    B, A = slots
    return None if isinstance(A, LinearMap) or isinstance(B, LinearMap) else (A, B)


def factors(made: Any) -> tuple[Tensor, Tensor] | None:
    """Return A and B of a chain of two bare matrices without a bias, a constant before it multiplied into B; or None."""
    if not isinstance(made, LinearMap) or made.bias is not None:
        return None
    slots: Any = getattr(made, "slots", ())
    if made.word == "scale":
        inner = factors(slots[0])
        return None if inner is None else (inner[0], made.scale * inner[1])  # type: ignore[operator]  # a number
    return bare(slots) if made.word == "chain" else None
