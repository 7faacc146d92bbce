"""MiniLM dense and at half of its linear parameters, through every runtime, as ratios of one interleaved run.

    python tests/benchmarks/bench_speed.py [--form two_factor] [--kept 0.5] [--round-to 96] [--rounds 25]
        [--runtimes eager torch_compile onnx aoti] [--settings default freezing max_autotune] [--static] [--loads 1]

`share` is the measured ratio over the ideal one, that of the FLOPs of the linears and the attention of the whole model.
`--settings` compares Inductor's settings for AOTInductor, `--static` adds packages that are compiled for one shape,
`--loads` opens each package several times and measures each.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import LAYERS, SOLVERS, sentences
from common import WORK, minilm, show

import lrc
from lrc.lower.aoti import AotiExport, AotiRunner, export_aoti
from lrc.lower.hf_folder import ModelRunner
from lrc.lower.inductor import CompiledRunner
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.lower.ort import OrtRunner
from lrc.program import Program
from lrc.run.benchmark import Pair, benchmark_pairs
from lrc.verify.cases import resized


def at_shape(program: Program, batch: int, length: int) -> Program:
    """The program with examples of one shape, for which a static package is compiled."""
    made = program.clone()
    sizes = {"batch": batch, "sequence": length}
    made.inputs = replace(made.inputs, examples=resized(made.inputs, sizes, torch.Generator().manual_seed(0)))
    return made


def packages(dense: Program, compressed: Program, how: AotiExport, folder: Path, loads: int) -> list[Pair]:
    """Both packages, opened several times: where the weights come to lie in memory is a draw of its own."""
    made = [
        folder / label / export_aoti(program, folder / label, how).artifact
        for label, program in (("dense", dense), ("compressed", compressed))
    ]
    name = f"AOTInductor {how.settings}{' static' if how.static else ''}"
    return [Pair(name, *map(AotiRunner, made)) for _ in range(loads)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--form", default="two_factor", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--round-to", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--settings", nargs="+", default=["default"], choices=["default", "freezing", "max_autotune"])
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--loads", type=int, default=1)
    parser.add_argument("--runtimes", nargs="+", default=["eager", "torch_compile", "onnx", "aoti"])
    options = parser.parse_args()
    dense = lrc.capture(str(minilm()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = lrc.compile(
            dense,
            {
                "version": 1,
                "calibration": {"dataset": str(sentences(folder)), "samples": 256, "max_length": 128, "seed": 0},
                "passes": [
                    {
                        "type": "factorize",
                        "targets": LAYERS,
                        "solver": SOLVERS["kfac"],
                        "rank": {"params_kept": options.kept},
                        "form": options.form,
                        "round_to": options.round_to,
                    }
                ],
            },
            cache=WORK / "cache",
        )
        pairs: list[Pair] = []
        original: Any = dense.origin.model
        if "eager" in options.runtimes:
            pairs.append(Pair("eager", ModelRunner(original), ModelRunner(done.graft())))
        if "torch_compile" in options.runtimes:
            pairs.append(Pair("torch.compile", CompiledRunner(original, {}, True), CompiledRunner(done.graft(), {}, True)))
        if "onnx" in options.runtimes:
            runners = []
            for label, program in (("dense", dense), ("compressed", done.program)):
                written = export_onnx(program, folder / label, OnnxExport())
                runners.append(OrtRunner(folder / label / written.artifact))
            pairs.append(Pair("ONNX Runtime", *runners))
        settings = options.settings if "aoti" in options.runtimes else ()
        for setting in settings:
            pairs += packages(dense, done.program, AotiExport(settings=setting), folder / setting, options.loads)
        rows = benchmark_pairs(pairs, dense, done.program, options.batches, options.lengths, options.rounds)
        for batch, length in product(options.batches, options.lengths) if options.static else ():
            fixed = [at_shape(program, batch, length) for program in (dense, done.program)]
            place = folder / f"{batch}x{length}"
            for setting in settings:
                pairs = packages(*fixed, AotiExport(settings=setting, static=True), place / setting, options.loads)
                rows += benchmark_pairs(pairs, dense, done.program, [batch], [length], options.rounds)
    parameters = done.plan.parameters
    show("speed of MiniLM", rows, kept=options.kept, form=options.form, dtype="float32", parameters=list(parameters))


if __name__ == "__main__":
    main()
