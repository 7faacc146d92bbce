"""Factorized LSTM and GRU layers against torch's own: eager and ONNX Runtime, median ratios of interleaved rounds.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_recurrent.py [--kinds LSTM GRU] [--kept 0.5] [--rounds 15]

The baseline is the dense layer in the same runtime, on one thread. Weights are random, both of every layer are cut by `svd`.
Beside the times stands how the hidden states' weight runs: multiplied out in torch's operator, or as a loop (`Scan` in ONNX).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from common import show
from torch import Tensor, nn

import lrc

SHAPES = [  # input, hidden, layers, steps, batch
    (64, 64, 1, 64, 1),
    (128, 128, 2, 64, 1),
    (128, 128, 1, 64, 16),
    (256, 256, 1, 64, 1),
    (256, 256, 2, 64, 16),
    (512, 512, 1, 64, 1),
    (1024, 1024, 1, 32, 1),
]


class Layers(nn.Module):
    """Recurrent layers alone."""

    def __init__(self, kind: str, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(features, hidden, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.rnn(x)[0]
        return made


def session(file: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])


def ratios(pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of the dense way, and of the ratio to it, every way in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for place in range(-2, rounds):
        for name, pair in pairs.items():
            spent = []
            for run in pair:
                begun = time.perf_counter()
                run()
                spent.append(1e3 * (time.perf_counter() - begun))
            if place >= 0:
                times[name].append((spent[0], spent[1]))
    return {
        name: {
            "dense_ms": round(statistics.median(a for a, _ in found), 3),
            "ratio": round(statistics.median(b / a for a, b in found), 3),
        }
        for name, found in times.items()
    }


def case(kind: str, shape: tuple[int, ...], kept: float, rounds: int, folder: Path) -> dict[str, Any]:
    features, hidden, layers, steps, batch = shape
    torch.manual_seed(0)
    model, x = Layers(kind, features, hidden, layers).eval(), torch.randn(batch, steps, features)
    program = lrc.capture(model, {"x": x})
    asked = {
        "version": 1,
        "passes": [{"type": "factorize", "solver": "svd", "rank": {"params_kept": kept}, "allocate": "uniform"}],
    }
    done, dense = (
        lrc.compile(program, asked, inputs={"x": x}),
        lrc.compile(program, {"version": 1, "passes": []}, inputs={"x": x}),
    )
    small = done.graft(model)
    files = [made.to_onnx(folder / f"{name}.onnx") for name, made in (("dense", dense), ("small", done))]
    kinds = {node.op_type for node in onnx.load(files[1]).graph.node}
    sessions = [session(file) for file in files]
    feeds = {sessions[0].get_inputs()[0].name: x.numpy()}
    with torch.inference_mode():
        found = ratios(
            {
                "eager": (lambda: model(x), lambda: small(x)),
                "onnx_runtime": (lambda: sessions[0].run(None, feeds), lambda: sessions[1].run(None, feeds)),
            },
            rounds,
        )
    row = {
        "kind": kind,
        "input_hidden_layers_steps_batch": list(shape),
        "numbers": list(done.plan.parameters),
        "bytes_of_files": [file.stat().st_size for file in files],
        "hidden_weight": "loop" if "Scan" in kinds else "multiplied out",
        **found,
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["LSTM", "GRU"], choices=["LSTM", "GRU"])
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="places in the list of shapes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = [case(kind, SHAPES[i], asked.kept, asked.rounds, Path(name)) for kind in asked.kinds for i in asked.shapes]
    show("recurrent layers", rows, baseline="the dense layer in the same runtime", threads=1, kept=asked.kept)


if __name__ == "__main__":
    main()
