"""Adapters as inputs of an ONNX graph: ONNX Runtime gives what the eager view gives, for one adapter and for another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import lrc
from lrc.api import compile_to_folder
from lrc.errors import LowerError
from lrc.lower.onnx_adapters import BESIDE, inputs_for
from lrc.lower.ort import OrtRunner
from lrc.lower.ort_decoder import OnnxDecoder
from lrc.lower.peft_export import PeftExport, peft_folder
from lrc.program import Program

ONNX = {"format": "onnx", "adapters": "inputs"}
INPUTS = {"x": tiny.mlp_inputs()}


def moved(program: Program, seed: int) -> Program:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return program


def adapted(model: Any, options: dict[str, Any], seed: int, **more: Any) -> Program:
    return moved(lrc.compile(model, {"version": 1, "passes": [{"type": "adapt", **options}]}, **more).program, seed)


def near(found: Any, expected: torch.Tensor) -> bool:
    wanted = expected.detach().numpy()
    return bool(np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("options", [{"rank": 3}, {"method": "dora", "rank": 3}, {"method": "vera", "rank": 6}],
                         ids=["lora", "dora", "vera"])  # fmt: skip
def test_one_file_serves_two_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    from lrc.lower.onnx_file import OnnxExport, export_onnx

    first = adapted(tiny.mlp(), options, 1, inputs=INPUTS)
    other = dict(options) if options.get("method") == "vera" else {**options, "alpha": 5}  # another scale too
    second = adapted(tiny.mlp(), other, 2, inputs=INPUTS)
    export_onnx(first, tmp_path, OnnxExport.model_validate(ONNX))
    runner = OrtRunner(tmp_path / "onnx" / "model.onnx")
    wanted = {f"{name}.{p}" for name, m in first.maps.items() for p, t in m.named_parameters() if t.requires_grad}
    assert set(runner.inputs) == {"x"} | {name for name in wanted if not name.endswith(".bias")}
    assert near(runner(**INPUTS)["output"], first.module()(**INPUTS))
    given = inputs_for(second, tmp_path / "onnx" / BESIDE)
    assert near(runner(**INPUTS, **given)["output"], second.module()(**INPUTS))
    assert not near(runner(**INPUTS)["output"], second.module()(**INPUTS))
    x = torch.cat([INPUTS["x"]] * 3)
    assert near(runner(x=x, **given)["output"], second.module()(x=x))


def test_adapters_of_another_rank_or_none_are_refused(tmp_path: Path) -> None:
    from lrc.lower.onnx_file import OnnxExport, export_onnx

    first = adapted(tiny.mlp(), {"rank": 3}, 1, inputs=INPUTS)
    export_onnx(first, tmp_path, OnnxExport.model_validate(ONNX))
    with pytest.raises(LowerError, match="as the graph has it"):
        inputs_for(adapted(tiny.mlp(), {"rank": 4}, 2, inputs=INPUTS), tmp_path / "onnx" / BESIDE)
    with pytest.raises(LowerError, match="no adapter that could be an input"):
        export_onnx(lrc.capture(tiny.mlp(), INPUTS), tmp_path / "none", OnnxExport.model_validate(ONNX))


@pytest.mark.slow
def test_a_decoder_with_a_cache_takes_adapters_too(llama: Path, tmp_path: Path, checked_here: None) -> None:
    options = {"targets": ["layers:[0-9]"], "rank": 2}
    first, second = (adapted(str(llama), options, seed) for seed in (1, 2))
    spec = {"version": 1, "passes": [{"type": "load_adapter", "path": str(tmp_path / "first")}], "export": [ONNX]}
    peft_folder(first, PeftExport())[0].save(tmp_path / "first")
    compile_to_folder(str(llama), spec, output=tmp_path / "out").raise_on_failure()
    decoder = OnnxDecoder(tmp_path / "out" / "onnx" / "model.onnx")
    given = inputs_for(second, tmp_path / "out" / "onnx" / BESIDE)
    ids = torch.arange(4, 12)[None].repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert near(decoder(**inputs)["logits"], first(**inputs)["logits"])
    assert near(decoder(**inputs, **given)["logits"], second(**inputs)["logits"])
    assert decoder.generate(ids, max_new_tokens=3).shape == (2, 11)
