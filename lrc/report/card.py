"""The README of an output folder: what it is, how it was made, how to load it, what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from lrc.report.units import count, share, size
from lrc.run.plan import Plan

LOADING = {
    "hf": "import lrc\nmodel = lrc.load(folder)      # or: import lrc.hf; AutoModel.from_pretrained(folder)",
    "pt2": 'model = lrc.load(folder)      # or: torch.export.load(folder + "/program.pt2").module()',
    "onnx": 'session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx")',
    "aoti": 'model = torch._inductor.aoti_load_package(folder + "/aoti/model.pt2")',
    "torch_compile": "model = torch.compile(lrc.load(folder), **settings)   # torch_compile/settings.json",
}


def model_card(plan: Plan, model: str, metrics: Sequence[Mapping[str, Any]], formats: Sequence[str], spec: str) -> str:
    """Return the card as Markdown."""
    before, after = plan.parameters
    lines = [
        f"# {model}, compressed by lrc",
        "",
        f"{count(before)} → {count(after)} parameters ({share(after, before)} kept), "
        f"{size(plan.bytes[0])} → {size(plan.bytes[1])}.",
        "",
    ]
    if metrics:
        lines += ["| metric | this model | original |", "|---|---|---|"]
        lines += [f"| {m['metric']} | {_number(m['value'])} | {_number(m['original'])} |" for m in metrics]
        lines.append("")
    lines += ["```python", *(LOADING[name] for name in formats if name in LOADING), "```", ""]
    lines += ["Made from this spec (`lrc/plan.json` has every layer, `lrc/report.html` the figures):", ""]
    lines += ["```yaml", spec.rstrip(), "```", ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
