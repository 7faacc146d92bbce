"""Every preset compiles a tiny model, with nothing but data added."""

from functools import cache
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from safetensors.torch import load_file, save_file

import lrc
from lrc.api import compile_to_folder
from lrc.maps import restore
from lrc.program import Program
from lrc.solvers import BUILTIN
from lrc.solvers.splits import BUILTIN as SPLITTERS_BUILTIN
from lrc.spec.load import load_document, preset_names
from lrc.spec.registry import ADAPTERS, ALLOCATORS, SOLVERS, SPLITTERS

SOLVER_NAMES = {rule.name for rule in BUILTIN}
SPLITTER_NAMES = {rule.name for rule in SPLITTERS_BUILTIN}


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path, checked_here: None) -> None:
    """Run every test in a folder of its own."""


@pytest.fixture(autouse=True)
def _times_like_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make times up: on a tiny layer the overhead of a second call outweighs every gain."""

    def measure(cache: Any, structures: Any, shape: tuple[int, ...], **_: Any) -> dict[str, float]:
        return {name: restore(structure).cost(prod(shape[:-1])).flops / 1e6 for name, structure in structures.items()}

    monkeypatch.setattr("lrc.run.budget.measure_operators", measure)


@cache
def captured(folder: Path) -> Program:
    """A folder's program, captured once for all presets."""
    return lrc.capture(folder)


@pytest.fixture(scope="module")
def nonnegative_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose weights have no negative entries, as `nmf` wants them."""
    folder = tiny.copy_of(llama, tmp_path_factory.mktemp("nonnegative") / "llama")
    file = folder / "model.safetensors"
    save_file({name: tensor.abs() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with experts."""
    return tiny.write_mixtral(tmp_path_factory.mktemp("mixtral"))


def needs_of(name: str) -> set[str]:
    """The solvers that a preset names."""
    text = (resources.files("lrc_specs") / f"{name}.yaml").read_text(encoding="utf-8")
    solvers = [step.get("solver") for step in yaml.safe_load(text)["passes"]]
    return {solver if isinstance(solver, str) else solver["type"] for solver in solvers if solver is not None}


def adapts(name: str) -> bool:
    """Whether a preset puts adapters into a model, and so makes it larger."""
    text = (resources.files("lrc_specs") / f"{name}.yaml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["passes"]
    return bool(steps[0]["type"] == "adapt" and steps[-1]["type"] != "merge")


COMPRESSING = [name for name in preset_names() if not adapts(name)]
ADAPTING = [name for name in preset_names() if adapts(name)]


def spec_of(name: str, data: Path) -> Path:
    """A spec that builds on a preset: the preset's name and data, and ranks that a tiny layer can have."""
    path = Path("spec.yaml")
    path.write_text(
        f"version: 1\npreset: {name}\ncalibration: {{dataset: {data / 'calib.txt'}, samples: 12, max_length: 12}}\n"
    )
    return path


@pytest.mark.parametrize("name", ADAPTING)
def test_a_preset_adapts_a_tiny_model(name: str, llama: Path, data: Path) -> None:
    model = captured(llama).clone()
    overrides = {  # for a tiny model
        "vera": ["passes.0.rank=8"],
        "flexora": [
            f"passes.1.recipe.data={{dataset: {data / 'stream.txt'}, max_length: 12}}",
            "passes.1.recipe.select={type: top_k, layers: 1}",  # the gate of one layer does not move
        ],
    }.get(name, [])
    done = compile_to_folder(model, spec_of(name, data), overrides=overrides, output="out")
    done.raise_on_failure()
    plan = done.record.plan
    adapted = [decision for decision in plan.decisions if decision.keep is None]
    assert adapted
    assert {decision.type for decision in adapted} - {"train"} == {"adapt"}
    assert all(row["ok"] for row in done.record.parity)
    assert plan.parameters[0] < plan.parameters[1] < 2 * plan.parameters[0]


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_preset_compiles_a_tiny_model(
    name: str, bert: Path, llama: Path, nonnegative_llama: Path, mixtral: Path, data: Path
) -> None:
    absent = needs_of(name) - SOLVER_NAMES - SPLITTER_NAMES
    if absent:
        pytest.skip(f"skipped: the solver {', '.join(sorted(absent))} is not there yet")
    others = {"nmf": nonnegative_llama, "experts": mixtral}
    model = captured(bert if "onnx" in name else others.get(name, llama))
    overrides = {  # for a tiny model
        "lord": ["passes.0.round_to=8"],
        "lr2vq": ["passes.0.solver.m=4", "passes.0.rank=2", "passes.1.recipe.k=4"],
        "size_mb": ["passes.0.rank.size_mb=0.04"],
        "loraprune": ["passes.1.recipe.skip_last=0"],
        "quality": [f"evaluate.dataset={data / 'stream.txt'}", "passes.0.rank.quality.resolution=0.2"],
    }.get(name, [])
    given = str(llama) if name == "sltrain" else model.clone()  # from scratch, which a captured program cannot start
    done = compile_to_folder(given, spec_of(name, data), overrides=overrides, output="out")
    done.raise_on_failure()
    plan = done.record.plan
    assert any(decision.keep is None for decision in plan.decisions)
    packed = any(
        word in decision.after.text for word in ("Quantized", "Codebook") for decision in plan.decisions
    )  # as many numbers, in fewer bytes
    assert packed or plan.parameters[1] < plan.parameters[0]
    assert plan.bytes[1] < plan.bytes[0]
    assert all(row["ok"] for row in done.record.parity)
    assert not any(d.rank for d in plan.decisions if d.type == "factorize" and d.name == "lm_head")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model.origin.model, lrc.load("out")))
    assert packed or before - after == plan.parameters[0] - plan.parameters[1]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_is_complete(name: str) -> None:
    text = (resources.files("lrc_specs") / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    if needs_of(name) - set(SOLVERS.names()) - set(SPLITTERS.names()):
        pytest.skip("skipped: its solver is not there yet")
    document, file = load_document(f"preset:{name}")
    assert file is None
    assert document.passes
    assert document.export


def test_there_is_a_preset_for_every_solver() -> None:
    named: set[Any] = set().union(*(needs_of(name) for name in preset_names()))
    assert named >= SOLVER_NAMES | SPLITTER_NAMES


def test_there_is_a_preset_for_every_adapter_method() -> None:
    steps = [yaml.safe_load((resources.files("lrc_specs") / f"{name}.yaml").read_text())["passes"][0] for name in ADAPTING]
    methods = [step.get("method", "lora") for step in steps]
    assert {m if isinstance(m, str) else m["type"] for m in methods} == set(ADAPTERS.names())


def test_there_is_a_preset_for_every_allocator_and_every_budget_of_its_own_kind() -> None:
    steps = [load_document(f"preset:{name}")[0].passes[0] for name in preset_names()]
    named = {step.allocate.type for step in steps if hasattr(step, "allocate")}
    assert named | {"global", "uniform"} >= {rule.name for rule in ALLOCATORS}
    budgets = {key for step in steps if hasattr(step, "rank") for key in getattr(type(step.rank), "model_fields", ())}
    assert budgets >= {"params_kept", "size_mb", "flops_kept", "latency_kept", "quality"}


def test_what_a_spec_says_itself_wins_over_its_preset() -> None:
    Path("spec.yaml").write_text("version: 1\npreset: svd\nexport: [onnx]\noutput: here\n")
    document, _ = load_document("spec.yaml")
    assert [options.format for options in document.export] == ["onnx"]  # type: ignore[attr-defined]  # of the exports
    assert document.output == "here"
    assert document.passes[0].solver.type == "svd"  # type: ignore[attr-defined]  # of factorize
