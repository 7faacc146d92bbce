"""Packed bytes: what `cost()` says, what is resident, and what the files take, on MiniLM and SmolLM2-135M.

    python tests/benchmarks/bench_packed.py [--model minilm smollm2] [--only nf4 int4 …]

Targets are the linears of all blocks. "cost" counts the whole program, "resident" the storages that it holds, "hf" and "onnx"
the files of weights; all in 10^6 bytes. "off" is the largest of their relative distances from "cost", "error" that of the ONNX
file's outputs from the program's, relative to their norm. The ONNX file of SmolLM2 is the graph of whole texts.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_minilm_quality import LAYERS
from common import WORK, minilm, show, smollm2

import lrc
from lrc.lower.hf_folder import HfExport, export_hf
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.lower.ort import OrtRunner

WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"type": "quantize", "format": "nf4"},
    "nf3": {"type": "quantize", "format": "nf3"},
    "int4": {"type": "quantize", "format": "int4"},
    "int8": {"type": "quantize", "format": "int8"},
    "sltrain 2:4": {
        "type": "split",
        "solver": {"type": "sltrain", "pattern": "2:4", "density": None, "iterations": 1},
        "rank": 16,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["minilm"], choices=["minilm", "smollm2"])
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.model:
        program = lrc.capture(str(minilm() if model == "minilm" else smollm2()))
        targets = LAYERS if model == "minilm" else ["model.layers.**"]
        for way in options.only:
            spec = {"version": 1, "passes": [WAYS[way] | {"targets": targets}]}
            rows.append({"model": model, "way": way, **measured(lrc.compile(program, spec, cache=WORK / "cache").program)})
            print(rows[-1], flush=True)
    show("packed bytes", rows)


def measured(program: Any) -> dict[str, Any]:
    cost = program.size()[1]
    held = [t.untyped_storage() for t in (*program.graph_module.parameters(), *program.graph_module.buffers())]
    found = {"resident": sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_hf(program, folder / "hf", HfExport())  # type: ignore[arg-type]  # a rule
        found["hf"] = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        options = OnnxExport(cache=False) if program.task == "text-generation" else OnnxExport()
        export_onnx(program, folder, options)  # type: ignore[arg-type]
        found["onnx"] = sum(path.stat().st_size for path in (folder / "onnx").iterdir())
        inputs = {name: value.detach() for name, value in program.inputs.examples.items()}
        runner = OrtRunner(folder / "onnx" / "model.onnx")
        with torch.no_grad():
            expected = program(**inputs)
        errors = [
            float((torch.from_numpy(value) - expected[name]).norm() / expected[name].norm())
            for name, value in runner(**inputs).items()
        ]
    off = max(abs(size / cost - 1) for size in found.values())
    sizes = {key: round(size / 1e6, 3) for key, size in {"cost": cost, **found}.items()}
    return sizes | {"off": round(off, 4), "error": float(f"{max(errors):.2g}")}


if __name__ == "__main__":
    main()
