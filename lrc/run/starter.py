"""`lrc init`: a commented spec for a given model, with patterns that match its layers."""

import re
from collections.abc import Iterable
from pathlib import Path

from lrc.errors import UsageError
from lrc.program import Program
from lrc.spec.patterns import layer_of
from lrc.spec.registry import ALLOCATORS, EXPORTERS, RANKS, SOLVERS, Registry

METRIC = {"sentence-similarity": "spearman", "text-generation": "perplexity", "text-classification": "accuracy"}
DATA = {
    "sentence-similarity": ("sentences.txt", "one sentence a line", "pairs.csv", "columns sentence1, sentence2, score"),
    "text-generation": (
        "calibration.txt",
        "plain text, read as one stream",
        "test.txt",
        "plain text, read as one stream",
    ),
    "text-classification": ("texts.txt", "one text a line", "labelled.csv", "columns text, label"),
}
TEXT = ("texts.txt", "one text a line", "", "")
OTHER = ("calibration.npz", "arrays named as the model's inputs", "test.npz", "arrays named as the inputs, and labels")


def starter_spec(program: Program, path: str) -> str:
    """Return the text of a spec for a captured model: its repeated layers as targets, half of their parameters kept."""
    task = program.task
    hf = program.origin.folder is not None
    calibration, what, test, columns = DATA.get(task or "", TEXT if hf and "input_ids" in program.inputs.examples else OTHER)
    metric = METRIC.get(task or "")
    lines = [
        "# yaml-language-server: $schema=./lrc.schema.json",
        "# Written by `lrc init`; `lrc plan` says what it would do, `lrc compile` does it.",
        "version: 1",
        f"model: {{path: {_quoted(path)}{f', task: {task}' if task else ''}}}",
        f"calibration: {{dataset: {calibration}, samples: 128, max_length: 128, seed: 0}}  # {what}; beside this file",
        "passes:",
        "  - type: factorize",
        "    targets:  # ordered, the last match wins; `*` within one part of a name, `**` across parts",
        *(f"      - {_quoted(pattern)}  # {count} sites" for pattern, count in patterns(program)),
        "    solver: kfac  # how a weight is decomposed",
        *choices(SOLVERS, "kfac"),
        "    rank: {params_kept: 0.5}  # of all targets together; or a whole number, the rank of every layer",
        *choices(RANKS, "params_kept", "rank", form="{{{name}: …}}"),
        "    # allocate: auto  # how a budget over all targets is shared",
        *choices(ALLOCATORS),
        "    # form: two_factor  # r(m+n) numbers, two products; pivoted: r(m+n-r) numbers and an index; auto: the smaller",
    ]
    if metric:
        lines += [
            f"evaluate:  # remove it, or put the data beside this file: {columns}",
            f"  dataset: {test}",
            f"  metrics: [{metric}]",
            "  gates: {max_degradation: 0.05}  # exit code 3 if the metric loses more; the result is written all the same",
        ]
    first = "hf" if hf else "pt2"
    others = ", ".join(rule.name for rule in EXPORTERS if rule.name not in (first, "onnx"))
    lines += [f"export: [{{format: {first}}}, {{format: onnx}}]  # also: {others}", "output: out", ""]
    return "\n".join(lines)


def choices(registry: Registry, *chosen: str, form: str = "{name}") -> list[str]:
    """Return a comment for every rule but the chosen ones: how it is written, and the first sentence about it."""
    lines = []
    for rule in registry:
        if rule.name not in chosen:
            about = (rule.options.__doc__ or "").strip().split("\n")[0].rstrip(".")
            lines.append(
                f"    #   {form.format(name=rule.name)}: {about}" if about else f"    #   {form.format(name=rule.name)}"
            )
    return lines


def patterns(program: Program) -> list[tuple[str, int]]:
    """Return patterns that match the sites in repeated layers (or all sites, where nothing repeats), with how many each."""
    layered = [fqn for fqn in program.sites if layer_of(fqn) is not None and not program.sites[fqn].tied]
    chosen = layered or [fqn for fqn in program.sites if not program.sites[fqn].tied]
    found: dict[str, int] = {}
    for name in _generalised(chosen):
        found[name] = found.get(name, 0) + 1
    return list(found.items())


def _generalised(fqns: Iterable[str]) -> list[str]:
    return [re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", fqn) for fqn in fqns]


def write_starter(program: Program, path: str, output: Path) -> Path:
    """Write the spec. Raises UsageError when the file is there already."""
    if output.exists():
        raise UsageError(str(output), expected="a new file", got="one that exists", hint="Choose another name with `-o`")
    output.write_text(starter_spec(program, path), encoding="utf-8")
    return output


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"[^\w./-]", word) else word
