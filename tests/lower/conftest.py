"""What the tests of the exports share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lrc
from lrc.api import Finished
from lrc.program import Program

Outputs = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


@pytest.fixture(scope="session")
def encoder(finished: Finished, bert: Path, spec: Path) -> Program:
    """The program that the finished folder was made of, in memory."""
    return lrc.compile(str(bert), spec, cache=finished.path.parent / ".lrc-cache").program


@pytest.fixture(scope="session")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The perceptron with a product in two factors, and one in pivoted form on either side of it."""
    passes = [
        {"type": "factorize", "solver": "svd", "targets": ["middle"], "rank": 3, "form": "two_factor"},
        {"type": "factorize", "solver": "svd", "targets": ["up", "down"], "rank": 5, "form": "pivoted"},
    ]
    cache = tmp_path_factory.mktemp("cache")
    return lrc.compile(tiny.captured_mlp(), {"version": 1, "passes": passes}, cache=cache).program


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Outputs]:
    """A function that runs code in a fresh process on stored inputs `inputs`, and returns the tensors it puts in `outputs`.

    torch=False: the process must get along without torch; inputs and outputs are then arrays.
    """

    def run(code: str, inputs: Mapping[str, Tensor], *, torch: bool = True) -> Outputs:
        save_file(dict(inputs), tmp_path / "inputs.safetensors")
        kind = "torch" if torch else "numpy"
        lines = [
            "import sys",
            f"from safetensors.{kind} import load_file, save_file",
            f"inputs = load_file({str(tmp_path / 'inputs.safetensors')!r})",
            "outputs = {}",
            code,
            *(() if torch else ("assert 'torch' not in sys.modules and 'lrc' not in sys.modules",)),
            f"save_file(outputs, {str(tmp_path / 'outputs.safetensors')!r})",
        ]
        environment = {**os.environ, "PYTHONPATH": ""}
        command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / "outputs.safetensors")

    return run


def padded_ids(batch: int, length: int, padding: int) -> dict[str, Tensor]:
    """Inputs of the encoder, the first sample with `padding` tokens masked at its end."""
    ids = torch.randint(4, tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, length - padding :] = 0
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


@pytest.fixture
def two_shapes() -> dict[str, dict[str, Tensor]]:
    """Inputs of the encoder at two shapes, both with padding."""
    return {"a": padded_ids(1, 6, 2), "b": padded_ids(5, 17, 9)}


def read_json(path: Path) -> Any:
    """Return the data of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
