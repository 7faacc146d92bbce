"""Decoders with a key-value cache in ONNX Runtime: tokens per second, compressed against dense, of one interleaved run.

    python tests/benchmarks/bench_decode.py [--models stories260k smollm2] [--kept 0.6] [--form auto] [--batches 1 8]
        [--lengths 16 128] [--rounds 15] [--samples 32]

The baseline is the dense model exported in the same way. A timed call makes 16 greedy tokens after texts that are in the cache.
`ratio` is of the times, `flop_ratio` that of the FLOPs of the linears and the attention for one token, `share` the one over the
other. SmolLM2 is calibrated as in bench_smollm2.py (its statistics are shared), on fewer windows with `--samples`. Before it is
timed, every file is held against `generate()` of the module with the same maps: the tokens must be equal.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_smollm2 import SOLVERS
from common import WORK, shared, show, smollm2

import lrc
from lrc.api import Compiled
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.lower.ort_decoder import OnnxDecoder
from lrc.program import Program
from lrc.program.graft import graft
from lrc.run.decoding import Pair, benchmark_decoding


def compiled(name: str, dense: Program, kept: float, form: str, samples: int) -> Compiled:
    rank = {"params_kept": kept}
    how = {"type": "factorize", "targets": ["model.layers.**"], "solver": SOLVERS["kfac"], "rank": rank, "form": form}
    spec: dict[str, Any] = {"version": 1, "passes": [how]}
    if name == "stories260k":
        stories = json.loads((shared(name) / "tinystories_sample_ids.json").read_text(encoding="utf-8"))
        calibration = [{"input_ids": torch.tensor([story[:512]])} for story in stories[:4]]
        return lrc.compile(dense, spec, calibration=calibration, cache=WORK / "cache")
    text = {"dataset": str(shared("wikitext2/wiki.valid.tokens")), "max_length": 512, "batch_size": 2, "seed": 0}
    return lrc.compile(dense, spec | {"calibration": text | {"samples": samples}}, cache=WORK / "cache")


def equal_tokens(program: Program, decoder: OnnxDecoder, tokens: int = 32) -> bool:
    """Whether two texts of 12 tokens, one of them padded, go on as with transformers."""
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model: Any = graft(program).eval()
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return bool((decoder.generate(ids, mask, max_new_tokens=tokens) == theirs.numpy()).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["stories260k", "smollm2"], choices=["stories260k", "smollm2"])
    parser.add_argument("--kept", type=float, default=0.6)
    parser.add_argument("--form", default="auto", choices=["auto", "two_factor", "pivoted"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        dense = lrc.capture(str(shared(name) if name == "stories260k" else smollm2()))
        done = compiled(name, dense, options.kept, options.form, options.samples)
        with tempfile.TemporaryDirectory() as folder:
            decoders, equal, size = {}, {}, {}
            for label, program in (("dense", dense), ("compressed", done.program)):
                path = Path(folder) / label / export_onnx(program, Path(folder) / label, OnnxExport()).artifact
                decoders[label], size[label] = OnnxDecoder(path), path.stat().st_size
                equal[label] = equal_tokens(program, decoders[label])
            about = {"model": name, "parameters": list(done.plan.parameters), "file_bytes": size, "equal_tokens": equal}
            print(json.dumps(about), flush=True)
            pair = Pair("ONNX Runtime", decoders["dense"], decoders["compressed"])
            found = benchmark_decoding([pair], dense, done.program, options.batches, options.lengths, options.rounds)
            rows += [{"model": name, **row} for row in found]
    show("decoding with a key-value cache", rows, kept=options.kept, form=options.form, dtype="float32")


if __name__ == "__main__":
    main()
