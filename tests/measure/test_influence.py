"""Blocks that are found on the graph, and what they change of what passes through them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import Captured, inputs_for
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.measure import Cache
from lrc.measure.influence import block_influence, block_name, find_blocks
from lrc.program import Program


class Residual(nn.Module):
    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(torch.tanh(x))


class Blocks(nn.Module):
    """Two blocks, one of them repeated, one that changes the shape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual(6, 1.0), Residual(6, 0.0), nn.Linear(6, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


def program() -> Program:
    return lrc.capture(model(), {"x": torch.randn(4, 5, 6)})


@pytest.mark.parametrize(
    ("fqn", "block"),
    [("model.layers.3.mlp.up", "model.layers.3"), ("layer2.0.conv1", "layer2.0"), ("0", "0"), ("head", ""), ("a.b1.c", "")],
)
def test_a_block_is_named_up_to_its_first_number(fqn: str, block: str) -> None:
    assert block_name(fqn) == block


def test_influence_is_one_minus_the_mean_cosine(tmp_path: Path) -> None:
    made, batches = model(), [{"x": torch.randn(n, 5, 6)} for n in (4, 2)]
    found = block_influence(program(), batches, ["layers.0", "layers.1", "layers.2", ""], Cache(tmp_path))
    x = torch.cat([batch["x"] for batch in batches])
    with torch.no_grad():
        expected = float((1 - F.cosine_similarity(x.double(), made.layers[0](x).double(), dim=-1)).mean())
    assert found == pytest.approx({"layers.0": expected, "layers.1": 0.0}, abs=1e-6)  # the third changes the shape


def test_a_measured_influence_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"x": torch.randn(4, 5, 6)}]
    found = block_influence(program(), batches, ["layers.0"], Cache(tmp_path))
    monkeypatch.setattr("lrc.measure.influence.Watch", None)
    assert block_influence(program(), batches, ["layers.0"], Cache(tmp_path)) == found


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "opt", "vit", "distilbert"])
def test_the_blocks_of_transformers_are_those_of_their_hidden_states(
    name: str, captured: Callable[[str], Captured], tmp_path: Path
) -> None:
    made = captured(name)
    blocks = {block_name(fqn) for fqn in made.dense.sites} - {""}
    inputs = inputs_for(name, 3, 7, padded=False)
    found = block_influence(made.program, [inputs], blocks, Cache(tmp_path))
    states: dict[str, Tensor] = {}
    for path, module in made.model.named_modules():
        if path in blocks:
            module.register_forward_hook(_keep(states, path))
    models.outputs_of(made.model, inputs)
    (block,) = blocks
    before, after = states[f"{block} in"].double(), states[block].double()
    expected = float((1 - F.cosine_similarity(before, after, dim=-1)).mean())
    assert found[block] == pytest.approx(expected, abs=1e-5)


def _keep(states: dict[str, Tensor], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states[f"{path} in"] = args[0]
        states[path] = output[0] if isinstance(output, tuple) else output

    return hook


def test_padding_does_not_count(captured: Callable[[str], Captured], tmp_path: Path) -> None:
    program = captured("llama").program
    padded = inputs_for("llama", 1, 7, padded=False)
    short = {key: value[:, :4] for key, value in padded.items()}
    padded["attention_mask"][:, 4:] = 0
    a, b = (block_influence(program, [given], ["model.layers.0"], Cache(tmp_path)) for given in (padded, short))
    assert a == pytest.approx(b, abs=1e-5)


def test_positions_of_images_are_rows(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer[0](x) * 1.0

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 6, 5)
    program = lrc.capture(net, {"x": x})
    found = block_influence(program, [{"x": x}], ["layer.0"], Cache(tmp_path))
    with torch.no_grad():
        expected = float((1 - F.cosine_similarity(x, net.layer[0](x), dim=1)).mean())
    assert found == pytest.approx({"layer.0": expected}, abs=1e-6)


def test_a_graph_without_blocks_has_none() -> None:
    assert find_blocks(program(), ["elsewhere.0", ""]) == {}
