"""A recurrent layer of maps by torch's own operator: the hidden states' weight multiplied out, the inputs' in its factors.

A step of a loop in Python, or of a `Scan`, costs more than a small weight's product. So up to `SMALL` numbers the one fused
operator runs on B A, which is made anew in every call (once per text, not per step); ONNX Runtime makes it once. What is stored
is the product. Chain(B, A) of the inputs stays in two: A for all times at once, and B as the operator's own weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.maps.base import LinearMap
from lrc.maps.composites import Chain
from lrc.maps.leaves import Dense
from lrc.maps.recurrence import Cell, States

SMALL = 2**19  # numbers of a hidden states' weight: 2 MB in float32, which the caches of a core hold from step to step
OPERATORS: dict[str, Any] = {
    "lstm": torch.ops.aten.lstm.input, "gru": torch.ops.aten.gru.input, "tanh": torch.ops.aten.rnn_tanh.input,
    "relu": torch.ops.aten.rnn_relu.input,
}  # fmt: skip
Held = LinearMap | tuple[Tensor, Tensor | None]  # a map, or a weight and its bias


def is_small(made: Held) -> bool:
    """Say whether a hidden states' weight is multiplied out: it is dense, or one weight in eval mode, of few numbers."""
    if not isinstance(made, LinearMap) or isinstance(made, Dense):
        return True
    return made.out_features * made.in_features <= SMALL and stands(made)


def stands(made: Held) -> bool:
    """Say whether a map is one weight and bias, in eval mode."""
    return not isinstance(made, LinearMap) or (made.obstacle() is None and not made.training)


def whole(made: Held) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias that a map stands for, by operations that can be exported."""
    if not isinstance(made, LinearMap):
        return made
    if isinstance(made, Dense):
        return made.weight, made.bias
    if isinstance(made, Chain) and not any(isinstance(slot, LinearMap) for slot in made.slots):
        return made.matrix(), made.bias
    rows = torch.eye(made.in_features + 1, made.in_features, dtype=made.dtype, device=next(made.parameters()).device)
    given = made(rows)  # the last one is zero, and gives the bias
    return (given[:-1] - given[-1]).T, given[-1]


def parted(made: Held, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the operator reads in place of x, and the weight and bias that it multiplies that with."""
    if isinstance(made, Chain) and len(made.slots) == 2 and not any(isinstance(slot, LinearMap) for slot in made.slots):
        B, A = made.slots
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        return F.linear(x, A), B, made.bias
    return (x, *whole(made))


def fused(cell: Cell, x: Tensor, inputs: Held, states: Held, hidden: Tensor, memory: Tensor | None = None) -> States:
    """Return the hidden states of all times, the last one, and the last memory.

    x: (batch, time, features), or time first; inputs, states: what x and the hidden states go through; hidden, memory:
    (batch, …) before the first step.
    """
    x, weight, bias = parted(inputs, x)
    inner, shift = whole(states)
    zeros = weight.new_zeros(weight.shape[0])
    params = [weight.contiguous(), inner.contiguous(), zeros if bias is None else bias, zeros if shift is None else shift]
    start = hidden.unsqueeze(0)
    state = [start, memory.unsqueeze(0)] if memory is not None else start
    x = x.flip(cell.time) if cell.reverse else x
    y, *last = OPERATORS[cell.kind](x, state, params, True, 1, 0.0, False, False, cell.batch_first)
    y = y.flip(cell.time) if cell.reverse else y
    return y, last[0].squeeze(0), last[1].squeeze(0) if len(last) > 1 else None


class FusedRecurrence(nn.Module):
    """One layer in one direction, in a graph that is written to a file."""

    def __init__(self, cell: Cell, inputs: LinearMap, states: LinearMap) -> None:
        super().__init__()
        self.cell, self.inputs, self.states = cell, inputs, states

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor | None = None) -> States:
        """Return the hidden states, the last one, and the last memory."""
        return fused(self.cell, x, self.inputs, self.states, hidden, memory)
