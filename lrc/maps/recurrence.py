"""A map inside a loop over time: the hidden-to-hidden weight of an LSTM, GRU or plain recurrent layer.

lstm   i, f, g, o = gates_t + W h;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = P (sigmoid(o) tanh(c))
gru    r, z, n = gates_t, u = W h;  n = tanh(n + sigmoid(r + u_r) u_n);     h = (1 - sigmoid(z + u_z)) n + sigmoid(z + u_z) h
tanh   h = tanh(gates_t + W h)      relu  the same with a rectifier

`gates` is what the inputs give, for all times at once. torch's own conventions: `nn.LSTM`, `nn.GRU`, `nn.RNN`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lrc.maps.base import LinearMap

fx.wrap("recur")  # one operation in the text of a program
fx.wrap("previous")
fx.wrap("unseen")

Kind = Literal["lstm", "gru", "tanh", "relu"]
GATES: dict[Kind, int] = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
States = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Cell:
    """What a loop computes at every step. batch_first: time is the second dimension, else the first; reverse: from the end."""

    kind: Kind
    batch_first: bool = False
    reverse: bool = False

    @property
    def time(self) -> int:
        """The dimension of time."""
        return 1 if self.batch_first else 0

    def step(self, x: Tensor, u: Tensor, hidden: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden state, before any projection, and the next memory (of an LSTM).

        x, u: what the inputs and what the hidden state give, (batch, gates * features).
        """
        if self.kind == "lstm":
            assert memory is not None, "an LSTM has a memory"
            i, f, g, o = (x + u).chunk(4, -1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            return o.sigmoid() * memory.tanh(), memory
        if self.kind == "gru":
            (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u.chunk(3, -1)
            z = (x_z + u_z).sigmoid()
            n = (x_n + (x_r + u_r).sigmoid() * u_n).tanh()
            return n + z * (hidden - n), None
        return (x + u).tanh() if self.kind == "tanh" else (x + u).relu(), None

    def run(
        self,
        apply: Callable[[Tensor], Tensor],
        gates: Tensor,
        hidden: Tensor,
        memory: Tensor | None = None,
        projection: Tensor | None = None,
        tap: Tensor | None = None,
        running: Tensor | None = None,
    ) -> States:
        """Return the hidden states of all times, the last one, and the last memory.

        apply: W h + b, (batch, hidden) to (batch, gates * features). gates: (batch, time, gates * features) or time first.
        hidden, memory: (batch, …) before the first step. projection: P (hidden, features). tap: zeros of the shape of
        `gates`, whose gradient is that of W h + b at every step; added where it has one. running: (batch, time) bool, or time
        first: a state stays as it is where False, and what is given there is zero.
        """
        tapped = tap is not None and tap.requires_grad

        def step(
            state: tuple[Tensor, ...], x: Tensor, t: Tensor | None = None, goes: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            u = apply(state[0])
            new, cells = self.step(x, u if t is None else u + t, state[0], state[1] if len(state) > 1 else None)
            new = new if projection is None else F.linear(new, projection)
            made = (new,) if cells is None else (new, cells)
            return made if goes is None else tuple(torch.where(goes, a, b) for a, b in zip(made, state, strict=True))

        start: tuple[Tensor, ...] = (hidden,) if memory is None else (hidden, memory)
        if torch.compiler.is_exporting():
            return self._scanned(step, start, gates)
        state, given = start, []
        steps = gates.unbind(self.time)
        taps = tap.unbind(self.time) if tapped and tap is not None else [None] * len(steps)
        masks = [None] * len(steps) if running is None else running.unsqueeze(-1).unbind(self.time)
        for place in reversed(range(len(steps))) if self.reverse else range(len(steps)):
            state = step(state, steps[place], taps[place], masks[place])
            given.append(state[0])
        y = torch.stack(given[::-1] if self.reverse else given, self.time)
        y = y if running is None else y * running.unsqueeze(-1)
        return y, state[0], state[1] if len(state) > 1 else None

    def _scanned(self, step: Callable[..., tuple[Tensor, ...]], start: tuple[Tensor, ...], gates: Tensor) -> States:
        """Return the same as one operator, whatever the number of steps."""
        from torch._higher_order_ops.scan import scan

        def combine(state: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            made = step(state, x)
            return made, made[0].clone()  # what is given may not share memory with what is carried

        start = tuple(part.clone() for part in start)
        last, y = scan(combine, start, gates.movedim(self.time, 0).contiguous(), reverse=self.reverse)
        return y.movedim(0, self.time), last[0], last[1] if len(last) > 1 else None


class Recurrence(nn.Module):
    """A map as it stands in a graph, inside of its loop. Its tensors have the names that they have in the map."""

    def __init__(self, made: LinearMap, cell: Cell) -> None:
        super().__init__()
        self.__dict__.update(map=made, cell=cell)
        self._parameters, self._buffers, self._modules = made._parameters, made._buffers, made._modules
        self._non_persistent_buffers_set = made._non_persistent_buffers_set
        self.training = made.training

    map: LinearMap
    cell: Cell

    @property
    def packed_numbers(self) -> int:
        """Those of the map."""
        return self.map.packed_numbers

    def train(self, mode: bool = True) -> "Recurrence":
        """Set the mode of the map, too."""
        super().train(mode)
        self.map.training = mode
        return self

    def forward(
        self, gates: Tensor, tap: Tensor, hidden: Tensor, memory: Tensor | None = None, projection: Tensor | None = None,
        **context: Any,
    ) -> States:  # fmt: skip
        """Return the hidden states, the last one, and the last memory; see `Cell.run`."""
        return self.cell.run(lambda h: self.map(h, **context), gates, hidden, memory, projection, tap)


def recur(
    gates: Tensor, tap: Tensor, hidden: Tensor, memory: Tensor | None, projection: Tensor | None, weight: Tensor,
    bias: Tensor | None, kind: Kind, batch_first: bool, reverse: bool,
) -> States:  # fmt: skip
    """Return what a `Recurrence` of one dense weight gives."""
    cell = Cell(kind, batch_first, reverse)
    return cell.run(lambda h: F.linear(h, weight, bias), gates, hidden, memory, projection, tap)


def unseen(gates: Tensor) -> Tensor:
    """Return zeros in the shape of `gates` that take no memory: where the gradient of W h + b is measured."""
    return gates.new_zeros(()).expand(gates.shape)


def previous(states: Tensor, hidden: Tensor, batch_first: bool, reverse: bool) -> Tensor:
    """Return the hidden states that every step reads: those of the step before it, and `hidden` (batch, features) at first."""
    time = 1 if batch_first else 0
    rest = states.narrow(time, 1 if reverse else 0, states.shape[time] - 1)
    first = hidden.unsqueeze(time)
    return torch.cat([rest, first] if reverse else [first, rest], time)
