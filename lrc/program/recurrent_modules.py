"""`nn.LSTM`, `nn.GRU` and `nn.RNN` whose weights are maps: torch's own modules call all of theirs by one operator."""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lrc.maps import LinearMap
from lrc.maps.fused_recurrence import Held, fused, is_small, stands
from lrc.maps.recurrence import Cell, Kind

WEIGHT = re.compile(r"weight_([ih]h_l\d+(?:_reverse)?)")  # of the inputs, or of the hidden states
KINDS: dict[str, Kind] = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "tanh", "RNN_RELU": "relu"}


class _Mapped(nn.RNNBase):
    """The recurrent layers of a module that it takes the place of, with the same arguments, parameters and results.

    Maps stand under the names of the weights that they took the place of, with their biases. A small hidden states' weight
    is multiplied out for torch's own operator; else, in training and for packed sequences, time is a loop in Python.
    """

    @classmethod
    def of(cls, module: nn.RNNBase) -> "_Mapped":
        """Return the layers with everything that `module` holds, which is not to be used any more."""
        made = cls.__new__(cls)
        made.__dict__ = module.__dict__
        made._flat_weights_names, made._flat_weights, made._flat_weight_refs = [], [], []
        return made

    def put(self, name: str, made: LinearMap) -> None:
        """Put a map in place of a weight and its bias. Raises AttributeError for a name that is no such weight."""
        found = WEIGHT.fullmatch(name)
        if found is None or not hasattr(self, name):
            raise AttributeError(name)
        self._parameters.pop(name, None)
        self._parameters.pop(f"bias_{found[1]}", None)
        self.add_module(name, made)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no one block of memory for weights that are products."""

    def __setstate__(self, d: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, d)  # type: ignore[no-untyped-call]  # torch's own
        self._flat_weights_names, self._flat_weights, self._flat_weight_refs = [], [], []

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - torch's name for it
        """Run; see the module that it takes the place of. Packed sequences are unpacked and packed again."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        start = self._start(x, hx, self.batch_first)
        if not batched and hx is not None:
            start = [part.unsqueeze(1) for part in start]
        y, ends = self._layers(x, start, self.batch_first)
        if not batched:
            y, ends = y.squeeze(0 if self.batch_first else 1), [end.squeeze(1) for end in ends]
        return y, tuple(ends) if self.mode == "LSTM" else ends[0]

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Return packed states; within, sequences are in the order of their lengths, longest first."""
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        start = self._start(x, hx, False)
        if hx is not None and packed.sorted_indices is not None:
            start = [part.index_select(1, packed.sorted_indices) for part in start]
        running = torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device)
        y, ends = self._layers(x, start, False, running)
        data = pack_padded_sequence(y, lengths, enforce_sorted=True).data
        if packed.unsorted_indices is not None:
            ends = [end.index_select(1, packed.unsorted_indices) for end in ends]
        given = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return given, tuple(ends) if self.mode == "LSTM" else ends[0]

    def _start(self, x: Tensor, hx: Any, batch_first: bool) -> list[Tensor]:
        """Return the first states, (layers * directions, batch, features) each: those given, or zeros."""
        if hx is not None:
            return list(hx) if self.mode == "LSTM" else [hx]
        batch = x.shape[0 if batch_first else 1]
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        return [x.new_zeros(count, batch, size) for size in sizes]

    def _layers(
        self, x: Tensor, start: list[Tensor], batch_first: bool, running: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        ends: list[list[Tensor]] = [[] for _ in start]
        place = 0
        for layer in range(self.num_layers):
            given = []
            for back in range(2 if self.bidirectional else 1):
                name = f"l{layer}{'_reverse' if back else ''}"
                cell = Cell(KINDS[self.mode], batch_first, bool(back))
                memory = start[1][place] if len(start) > 1 else None
                projection = getattr(self, f"weight_hr_{name}", None)
                inputs, states = self._held(f"ih_{name}"), self._held(f"hh_{name}")
                if running is None and projection is None and stands(inputs) and is_small(states):
                    y, hidden, memory = fused(cell, x, inputs, states, start[0][place], memory)
                else:
                    gates = times(inputs, x)
                    y, hidden, memory = cell.run(
                        partial(times, states), gates, start[0][place], memory, projection, running=running
                    )
                given.append(y)
                ends[0].append(hidden)
                if memory is not None:
                    ends[1].append(memory)
                place += 1
            x = torch.cat(given, -1) if len(given) > 1 else given[0]
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, [torch.stack(end) for end in ends]

    def _held(self, name: str) -> Held:
        """Return the map of a name, or the weight there and its bias."""
        held: Any = getattr(self, f"weight_{name}")
        return held if isinstance(held, LinearMap) else (held, getattr(self, f"bias_{name}", None))


def times(held: Held, x: Tensor) -> Tensor:
    """Apply a map, or a weight and its bias."""
    made: Tensor = held(x) if isinstance(held, LinearMap) else F.linear(x, *held)
    return made


class MappedLSTM(_Mapped, nn.LSTM):
    """`nn.LSTM` on maps."""


class MappedGRU(_Mapped, nn.GRU):
    """`nn.GRU` on maps."""


class MappedRNN(_Mapped, nn.RNN):
    """`nn.RNN` on maps."""
