"""Every artifact of a folder against the dense model through the same runtime, interleaved, as ratios."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.errors import UsageError
from lrc.lower.base import Runner
from lrc.lower.hf_folder import ModelRunner
from lrc.lower.inductor import CompiledRunner
from lrc.lower.load import load
from lrc.measure import measure_latency, speedup
from lrc.program import Program
from lrc.run.artifact import open_artifact
from lrc.run.decoding import Pair, benchmark_decoding
from lrc.run.environment import environment
from lrc.run.flops import count_flops
from lrc.run.prepare import capture
from lrc.run.reexport import program_of
from lrc.spec.registry import EXPORTERS
from lrc.verify.cases import resized

ROUNDS = 15


def benchmark_folder(
    folder: Path,
    model: str | None,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    compile_modules: bool = False,
    rounds: int = ROUNDS,
    allow_code: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Return a row per runtime and shape: times in ms, the ratio, the FLOP ratio, and the share of it that was reached.

    `rows` are of whole texts, `decode` of one token after the other, by the artifacts that have a key-value cache.
    model: the dense one; the folder's manifest names it otherwise. Dense counterparts are lowered into a temporary folder.
    """
    manifest = _manifest(folder)
    dense = capture(model or dense_name(manifest), allow_code=allow_code)
    with tempfile.TemporaryDirectory(prefix="lrc-benchmark-") as scratch:
        pairs = pairs_of(folder, manifest, dense, Path(scratch), compile_modules)
        compressed = program_of(folder)
        return {
            "rows": benchmark_pairs(pairs, dense, compressed, batches, lengths, rounds),
            "decode": benchmark_decoding(pairs, dense, compressed, batches, lengths, rounds),
        }


def dense_name(manifest: Mapping[str, Any]) -> str:
    """Return the dense model that a manifest names. Raises UsageError where it does not say in which folder that is."""
    name = str(manifest["model"])
    if not any(mark in name for mark in "/:") and not Path(name).exists():
        raise UsageError(
            "MODEL", message=f"the folder was made from {name!r} and does not say where that is", hint="Name the dense MODEL"
        )  # fmt: skip
    return name


def pairs_of(folder: Path, manifest: Mapping[str, Any], dense: Program, scratch: Path, compile_modules: bool) -> list[Pair]:
    """Return the pairs: eager (and compiled, if asked), and one for every lowered artifact."""
    module = load(folder)
    pairs = [Pair("eager", ModelRunner(dense.origin.model or dense.module()), ModelRunner(module))]
    if compile_modules:
        pairs.append(
            Pair(
                "torch.compile",
                CompiledRunner(dense.origin.model or dense.module(), {}, True),
                CompiledRunner(module, {}, True),
            )
        )
    for name, made in manifest["artifacts"].items():
        if name in ("hf", "pt2", "torch_compile"):
            continue
        rule = EXPORTERS.get(name)
        written = rule(dense, scratch, rule.options.model_validate(made.get("options", {})))
        pairs.append(
            Pair(
                name,
                open_artifact(str(scratch / written.artifact), allow_code=True),
                open_artifact(str(folder / made["path"]), allow_code=True),
            )
        )
    return pairs


def benchmark_pairs(
    pairs: Sequence[Pair],
    dense: Program,
    compressed: Program,
    batches: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Time every pair at all shapes, dense and compressed interleaved.

    One runtime after the other: the idle threads of one would spin on the cores that the next one needs.
    """
    rows = []
    for batch in batches:
        for length in lengths:
            sizes = {"batch": batch, "sequence": min(length, dense.inputs.largest.get("sequence", length))}
            inputs = resized(dense.inputs, sizes, torch.Generator().manual_seed(0))
            ideal = count_flops(dense, inputs) / count_flops(compressed, inputs)
            for pair in pairs:
                calls = {"dense": _call(pair.dense, inputs), "compressed": _call(pair.compressed, inputs)}
                times = measure_latency(calls, rounds=rounds)
                before, after = times["dense"], times["compressed"]
                ratio = speedup(before, after)
                rows.append({
                    "runtime": pair.name, "batch": batch, "length": length,
                    "dense_ms": round(1e3 * before.median, 2), "compressed_ms": round(1e3 * after.median, 2),
                    "ratio": round(ratio, 3), "flop_ratio": round(ideal, 3), "share": round(ratio / ideal, 3),
                })  # fmt: skip
    return rows


def machine() -> dict[str, Any]:
    """Return the machine that figures belong to."""
    return environment()


def _call(runner: Runner, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    return lambda: runner(**inputs)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "lrc" / "manifest.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(str(folder), expected="a finished output folder of lrc", got=str(error)) from error
    return data
