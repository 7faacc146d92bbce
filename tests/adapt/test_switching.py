"""Several named adapters on one program: switched, trained one by one, merged, in ONNX as inputs."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.errors import UsageError
from lrc.lower.peft_export import PeftExport, peft_folder

INPUTS = {"x": tiny.mlp_inputs()}


def adapter(folder: Path, seed: int, **options: Any) -> Path:
    """A PEFT folder of a tiny model with random factors."""
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", "rank": 3} | options]}, inputs=INPUTS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft_folder(made.program, PeftExport())[0].save(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "a": adapter(tmp_path / "a", 1),
        "b": adapter(tmp_path / "b", 2, rank=5, alpha=4, targets=["up", "down"]),
        "d": adapter(tmp_path / "d", 3, method="dora"),
    }


def alone(folder: Path) -> torch.Tensor:
    """What the model gives with one folder's adapter."""
    passes = [{"type": "load_adapter", "path": str(folder)}]
    return lrc.compile(tiny.mlp(), {"version": 1, "passes": passes}, inputs=INPUTS).module(**INPUTS)


def test_every_adapter_gives_what_it_gives_alone_and_no_graph_is_made_again(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": []}, inputs=INPUTS)
    for name, folder in folders.items():
        made.adapters.load(name, folder)
    module, tree, graph = made.adapters.module(), made.adapters.graft(), made.program.graph_module
    made.adapters.set("a")
    code = type(graph).forward
    for name in ["b", "a", "d", "a", "b"]:
        lrc.set_adapter(tree, name)
        assert made.adapters.active == name
        assert torch.equal(module(**INPUTS), alone(folders[name]))
        assert torch.equal(tree(**INPUTS), alone(folders[name]))
    lrc.set_adapter(tree, None)
    assert torch.equal(tree(**INPUTS), tiny.mlp()(**INPUTS))
    assert torch.equal(module(**INPUTS), tiny.mlp()(**INPUTS))
    assert type(graph).forward is code


def test_training_one_adapter_leaves_the_others(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": []}, inputs=INPUTS)
    for name, folder in folders.items():
        made.adapters.load(name, folder)
    tree = made.adapters.graft()
    lrc.set_adapter(tree, "b")
    trained = [p for p in tree.parameters() if p.requires_grad]
    assert len(trained) == 4  # two sites with A and B
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    tree(**INPUTS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(tree(**INPUTS), alone(folders["b"]))
    for name in ("a", "d"):
        lrc.set_adapter(tree, name)
        assert torch.equal(tree(**INPUTS), alone(folders[name]))


def test_one_of_several_is_merged(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": []}, inputs=INPUTS)
    for name, folder in folders.items():
        made.adapters.load(name, folder)
    made.adapters.set("a")
    for name in ("b", "d"):
        merged = made.adapters.merged(name)
        assert all(type(held).__name__ == "Dense" for fqn, held in merged.maps.items())
        assert not merged.adapters
        assert torch.allclose(merged.module()(**INPUTS), alone(folders[name]), atol=1e-5)
    assert made.adapters.active == "a"
    assert torch.equal(made.module(**INPUTS), alone(folders["a"]))


def test_adapters_join_the_one_that_a_pass_has_made(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", "rank": 2}]}, inputs=INPUTS)
    made.adapters.load("b", folders["b"])
    assert made.adapters.names == ("default", "b")
    assert torch.equal(made.module(**INPUTS), alone(folders["b"]))
    made.adapters.set("default")
    assert torch.equal(made.module(**INPUTS), tiny.mlp()(**INPUTS))
    assert {kept.rank for kept in made.program.adapters.values()} == {2}


def test_a_model_is_loaded_with_adapters(llama: Path, tmp_path: Path) -> None:
    spec = {"version": 1, "passes": [{"type": "adapt", "targets": ["layers:[0-9]"], "rank": 2, "init": "random"}]}
    for name, seed in (("x", 0), ("y", 1)):
        spec["calibration"] = {"dataset": "none:none", "seed": seed}
        made = lrc.compile(str(llama), spec)
        peft_folder(made.program, PeftExport())[0].save(tmp_path / name)
    model: Any = lrc.load(llama, adapters={"x": tmp_path / "x", "y": tmp_path / "y"})
    ids = torch.arange(4, 12)[None]
    found = {}
    for name in ("x", "y", None):
        lrc.set_adapter(model, name)
        found[name] = model(input_ids=ids).logits
    assert torch.equal(found[None], lrc.load(llama)(input_ids=ids).logits)
    assert not torch.equal(found["x"], found["y"])
    assert torch.equal(model.generate(ids, max_new_tokens=2)[:, :8], ids)


def test_a_wrong_name_and_a_module_without_adapters_are_refused(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": []}, inputs=INPUTS)
    made.adapters.load("a", folders["a"])
    with pytest.raises(UsageError, match="one of a, got 'c'"):
        made.adapters.set("c")
    with pytest.raises(UsageError, match="a name that is not taken"):
        made.adapters.load("a", folders["b"])
    with pytest.raises(UsageError, match="has no named adapters"):
        lrc.set_adapter(tiny.mlp(), "a")


def test_an_adapter_without_a_base_beside_it_cannot_be_switched_off(folders: dict[str, Path]) -> None:
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": [{"type": "adapt", "init": "pissa", "rank": 2}]}, inputs=INPUTS)
    with pytest.raises(UsageError, match="no branch beside an untouched base"):
        made.adapters.set(None)
    with pytest.raises(UsageError, match="no branch beside an untouched base"):
        made.adapters.load("a", folders["a"])
