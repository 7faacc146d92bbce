"""How fast decoders with a cache make one token after the other, dense against compressed, as ratios."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lrc.lower.base import Runner
from lrc.lower.ort_decoder import OnnxDecoder, State
from lrc.measure import measure_latency, speedup
from lrc.program import Program
from lrc.run.flops import count_flops
from lrc.verify.cases import resized

TOKENS = 16  # made in one timed run


@dataclass(frozen=True)
class Pair:
    """The dense and the compressed model through one runtime."""

    name: str
    dense: Runner
    compressed: Runner


def benchmark_decoding(
    pairs: Sequence[Pair], dense: Program, compressed: Program, batches: Sequence[int], lengths: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Time TOKENS greedy tokens after texts of all shapes that are in the cache, dense and compressed interleaved.

    Pairs without a cache are left out. Times are those of one token of every text; tokens per second are of all texts together.
    """
    rows = []
    decoders = [
        (pair.name, pair.dense, pair.compressed)
        for pair in pairs
        if isinstance(pair.dense, OnnxDecoder) and isinstance(pair.compressed, OnnxDecoder)
    ]
    for (name, before, after), batch, wanted in product(decoders, batches, lengths):
        length = min(wanted, max(1, dense.inputs.largest.get("sequence", wanted + TOKENS) - TOKENS))
        inputs = resized(dense.inputs, {"batch": batch, "sequence": length}, torch.Generator().manual_seed(0))
        total = length + TOKENS // 2
        ideal = step_flops(dense, inputs, total) / step_flops(compressed, inputs, total)
        calls = {"dense": going_on(before, inputs), "compressed": going_on(after, inputs)}
        times = measure_latency(calls, rounds=rounds)
        ratio = speedup(times["dense"], times["compressed"])
        seconds = {label: time.median / TOKENS for label, time in times.items()}
        rows.append({
            "runtime": name, "batch": batch, "past": length,
            "dense_ms": round(1e3 * seconds["dense"], 3), "compressed_ms": round(1e3 * seconds["compressed"], 3),
            "dense_tokens_per_s": round(batch / seconds["dense"], 1),
            "compressed_tokens_per_s": round(batch / seconds["compressed"], 1),
            "ratio": round(ratio, 3), "flop_ratio": round(ideal, 3), "share": round(ratio / ideal, 3),
        })  # fmt: skip
    return rows


def going_on(decoder: OnnxDecoder, inputs: Mapping[str, Tensor]) -> Callable[[], State]:
    """Return a call that makes TOKENS greedy tokens after texts that are in the cache already."""
    start = decoder.prefill(inputs["input_ids"])

    def call() -> State:
        state = start
        for _ in range(TOKENS):
            state = decoder.step(state, state.logits.argmax(-1))
        return state

    return call


def step_flops(program: Program, inputs: Mapping[str, Tensor], total: int) -> float:
    """Return the FLOPs of one token of every text, `total` tokens in its attention.

    A program counts whole texts of n tokens: f(n) = a n + c n^2, a of the linears and c of the attention, which f(1) and f(2)
    tell. One token costs a + c total.
    """
    one, two = (count_flops(program, {name: value[:, :n] for name, value in inputs.items()}) for n in (1, 2))
    attention = two / 2 - one
    return one - attention + attention * total
