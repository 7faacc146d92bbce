"""Greedy text from an ONNX decoder with a key-value cache, by ONNX Runtime alone; this module imports no torch either."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from lrc.errors import UsageError
from lrc.lower.ort import PAST, Array, OrtRunner, as_array

LOGITS, PRESENT = "logits", "present."


@dataclass(frozen=True)
class State:
    """Texts that are in the cache.

    logits: of the token after them, (batch, vocabulary); mask: (batch, length), 0 for padding; positions: of the next token,
    (batch, 1); cache: keys and values by the names of the graph's inputs, in ONNX Runtime's own memory.
    """

    logits: Array
    mask: Array
    positions: Array
    cache: Mapping[str, OrtValue]


class OnnxDecoder:
    """A decoder on `model.onnx` with a cache: `generate`, or `prefill` and `step` for a loop of one's own.

    The cache is handed from one run to the next as ONNX Runtime left it, and never copied into numpy. Called with inputs by
    name it is the runner that it was made of. Raises UsageError for a graph without a cache.
    """

    def __init__(self, runner: OrtRunner | Path | str) -> None:
        self.runner = runner if isinstance(runner, OrtRunner) else OrtRunner(runner)
        if not has_cache(self.runner):
            raise UsageError(
                self.runner.path.name, expected=f"inputs {PAST}0.key, …", got=", ".join(self.runner.inputs),
                hint="Export the decoder with `cache: true`",
            )  # fmt: skip
        self.cache_inputs = [name for name in self.runner.inputs if name.startswith(PAST)]
        self.wanted = [LOGITS, *(PRESENT + name.removeprefix(PAST) for name in self.cache_inputs)]

    def __call__(self, **inputs: Any) -> dict[str, Array]:
        """Run the graph once; see `OrtRunner`."""
        return self.runner(**inputs)

    def prefill(self, input_ids: Any, attention_mask: Any = None) -> State:
        """Return the state after texts, (batch, length) ids padded on the left where the (batch, length) mask is 0."""
        ids = np.asarray(as_array(input_ids), np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(as_array(attention_mask), np.int64)
        if ids.ndim != 2 or not ids.size or mask.shape != ids.shape:
            got = f"{list(ids.shape)} and {list(mask.shape)}"
            raise UsageError("input_ids, attention_mask", expected="two of shape (batch, length >= 1)", got=got)
        if not mask[:, -1].all():
            raise UsageError("attention_mask", expected="padding on the left", got="a masked last token")
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        empty = {name: OrtValue.ortvalue_from_numpy(self.runner.empty(name, len(ids))) for name in self.cache_inputs}
        return self._run(ids, mask, positions, empty)

    def step(self, state: State, tokens: Array) -> State:
        """Return the state after one more token of every text, (batch,)."""
        mask = np.pad(state.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None], mask, state.positions, state.cache)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Array:
        """Return the ids with up to `max_new_tokens` greedy tokens after them, (batch, length + new), int64.

        A text ends with one of `eos_token_id`; what follows is `pad_token_id`, the first of them by default. The run ends when
        every text has. Padding is on the left, as the mask says.
        """
        given = [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id, np.int64)).tolist()
        padding = pad_token_id if pad_token_id is not None or not given else given[0]
        ids = np.asarray(as_array(input_ids), np.int64)
        state: State | None = None
        made: list[Array] = []
        unfinished = np.ones(len(ids), bool)
        while len(made) < max_new_tokens and unfinished.any():
            state = self.prefill(ids, attention_mask) if state is None else self.step(state, made[-1])
            tokens = state.logits.argmax(-1)
            made.append(tokens if padding is None else np.where(unfinished, tokens, padding))
            unfinished &= ~np.isin(made[-1], given)
        return np.concatenate([ids, *(tokens[:, None] for tokens in made)], axis=1)

    def _run(self, ids: Array, mask: Array, positions: Array, cache: Mapping[str, OrtValue]) -> State:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {**self.runner.adapters, **given}
        feed = {name: OrtValue.ortvalue_from_numpy(given[name]) for name in self.runner.inputs if name in given}
        logits, *present = self.runner.session.run_with_ort_values(self.wanted, {**feed, **cache})
        last = logits.numpy()[:, -1]
        return State(last, mask, positions[:, -1:] + 1, dict(zip(self.cache_inputs, present, strict=True)))


def has_cache(runner: OrtRunner) -> bool:
    """Say whether a graph takes a key-value cache."""
    return any(name.startswith(PAST) for name in runner.inputs)


def open_onnx(path: Path) -> OrtRunner | OnnxDecoder:
    """Open an ONNX file: as a decoder that generates, where it has a cache."""
    runner = OrtRunner(path)
    return OnnxDecoder(runner) if has_cache(runner) else runner
