"""Two processes of torchrun, on the CPU by gloo: the losses and values of one process, one writer, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, write_bert

HERE = Path(__file__).parent


def torchrun(*words: str | Path, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run a script or module in some processes."""
    given = ["--standalone", "--nproc-per-node", str(processes), *map(str, words)]
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *given], check=False, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    lines = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(12)) for i in range(24)]
    (folder / "even.txt").write_text("\n".join(lines), encoding="utf-8")
    return write_bert(folder / "bert", num_hidden_layers=2)


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(bert: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 end within rounding of one process on the same batches; a resumed run at the same bits."""
    script = HERE / "sharing.py"
    made = torchrun(script, tmp_path, bert)
    assert made.returncode == 0, made.stderr[-3000:]
    alone = torchrun(script, tmp_path, bert, processes=1)
    assert alone.returncode == 0, alone.stderr[-3000:]
    two, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (2, 1))
    for model in ("mlp", "bert"):
        wanted = one[f"{model} auto"]
        for kind in ("ddp", "fsdp2"):
            close(two[f"{model} {kind}"], wanted)
    close(two["during ddp"], one["during auto"])
    assert len(set(one["mlp auto"]["losses"])) == 6
    for kind in ("ddp", "fsdp2"):
        assert two[f"mlp {kind} again"] == two[f"mlp {kind}"]
    batch, layers, whole, recipe, during = two["refused"]
    assert "a `batch_size` that 2 processes share evenly, got 7" in batch
    assert "`per_layer` updates before gradients are averaged" in layers
    assert "`fira` wants whole gradients, not shares of them. Set `distributed: ddp`" in whole
    assert "the recipe `maestro` wants whole parameters. Set `distributed: ddp`" in recipe
    assert "`during` wants whole parameters. Set `distributed: ddp`" in during
    assert two["fira"][-1] < two["fira"][0]


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4, abs=1e-6)
    for name, values in wanted["weights"].items():
        a, b = torch.tensor(found["weights"][name]), torch.tensor(values)
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-4), (name, float((a - b).abs().max()))


@pytest.mark.slow
def test_the_command_line_under_torchrun_writes_one_folder_and_tells_once(bert: Path, tmp_path: Path) -> None:
    passes = [
        {"type": "factorize", "targets": ["layers:[0-9]"], "solver": "svd", "rank": {"fraction": 0.5}, "form": "two_factor"},
        {"type": "train", "data": str(bert.parent / "even.txt"), "objective": "distillation", "steps": 4, "batch_size": 8},
    ]
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"version": 1, "passes": passes, "export": [{"format": "hf"}]}))
    words = ("-m", "lrc.cli", "compile", spec, bert, "-o", tmp_path / "out", "--json")
    made = torchrun(*words)
    assert made.returncode == 0, made.stderr[-3000:]
    assert json.loads(made.stdout)["output"] == str(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "lrc" / "manifest.json").read_text())
    assert [row["step"] for row in manifest["training"][0]["history"]] == [1, 2, 3, 4]
    refused = torchrun(*words)
    assert refused.returncode != 0
    assert "expected an empty or absent output folder" in refused.stderr


BAD = """
import sys
from pathlib import Path
import torch
from tiny import captured_mlp, mlp_inputs
import lrc
from lrc.errors import LrcError

def bad():
    return [{"x": mlp_inputs(32), "labels": torch.tensor([0] * 5 + [77] + [0] * 26)}]

if __name__ == "__main__":
    squeeze = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.25}, "form": "two_factor"}
    train = {"type": "train", "data": "bad:bad", "objective": "classification", "steps": 8, "batch_size": 8}
    try:
        lrc.compile(captured_mlp(), {"version": 1, "passes": [squeeze, train]}, cache=Path(sys.argv[1]), allow_code=True)
    except LrcError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_an_error_of_one_process_stops_them_all_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    made = torchrun(tmp_path / "bad.py", tmp_path / "cache")
    assert made.returncode != 0
    assert "labels 0 to 9, the classes of the model, got 77" in made.stdout
    assert "Traceback" not in made.stdout
    assert "Connection closed by peer" not in made.stderr
