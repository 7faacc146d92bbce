"""The exports that come with lrc. A third-party one enters by the same door, the entry points `lrc.exporters`."""

from typing import Any

from lrc.lower.aoti import export_aoti
from lrc.lower.hf_folder import export_hf
from lrc.lower.inductor import export_torch_compile
from lrc.lower.onnx_file import export_onnx
from lrc.lower.peft_export import export_peft
from lrc.lower.pt2 import export_pt2
from lrc.spec.registry import Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (export_hf, export_onnx, export_aoti, export_torch_compile, export_pt2, export_peft)
