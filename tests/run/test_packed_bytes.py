"""The bytes that `cost()` says are those in memory and those in the files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import lrc
from lrc.program import Program

STEPS: dict[str, dict[str, Any]] = {
    "nf4": {"type": "quantize", "format": "nf4"},
    "nf3": {"type": "quantize", "format": "nf3"},
    "int8": {"type": "quantize", "format": "int8"},
    "2:4": {"type": "split", "solver": {"type": "slim", "pattern": "2:4"}, "rank": 4},
    "16x16": {"type": "split", "solver": {"type": "godec", "pattern": "16x16", "density": 0.25, "iterations": 1}, "rank": 4},
    "few": {"type": "split", "solver": {"type": "godec", "pattern": "all", "density": 0.02, "iterations": 1}, "rank": 4},
}


def resident(program: Program) -> int:
    """The bytes of all storages that the graph holds, each once."""
    held = [t.untyped_storage() for t in (*program.graph_module.parameters(), *program.graph_module.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


@pytest.mark.parametrize("name", list(STEPS))
def test_the_bytes_in_memory_are_those_of_the_cost(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).eval()
    x: Tensor = torch.randn(16, 96)
    done = lrc.compile(
        model, {"version": 1, "passes": [STEPS[name]]}, inputs={"input": x}, calibration=[{"input": x}], cache="cache"
    )
    costs = sum(site.map.cost().bytes for site in done.program.sites.values())
    assert resident(done.program) == done.program.size()[1] == costs


@pytest.mark.slow
def test_the_bytes_in_a_folder_are_those_of_the_program(bert: Path) -> None:
    done = lrc.compile(
        str(bert), {"version": 1, "passes": [STEPS["nf4"] | {"targets": ["encoder.**"]}], "export": ["hf"]}, cache="cache"
    )
    done.save("out")
    with safe_open("out/model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - no mapping
    made_anew = sum(t.nbytes for t in done.program.graph_module.buffers() if t.dtype == torch.int64)  # positions
    assert stored == pytest.approx(resident(done.program) - made_anew, rel=0.01)
