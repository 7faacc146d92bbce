"""The training mode of a program against the user's module in training mode, with the same random numbers."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import USING_CACHE, Captured, inputs_for
from torch import Tensor, nn

from lrc.program.capture import capture_exported, capture_module
from lrc.program.modes import running_statistics, training_graph
from lrc.program.ownership import own


@pytest.mark.parametrize("name", ["bert", "gpt2", "distilbert", "llama", "vit"])
def test_training_mode_is_that_of_the_module_bit_for_bit(captured: Callable[[str], Captured], name: str) -> None:
    got = captured(name)
    inputs = inputs_for(name, 3, 7)
    made = training_graph(got.dense)
    assert made.notes == ()
    with torch.no_grad(), torch.random.fork_rng():
        extra = {"use_cache": False} if name in USING_CACHE else {}
        got.model.train()
        torch.manual_seed(3)
        wanted = got.model(**inputs, **extra)[0]
        got.model.eval()
        torch.manual_seed(3)
        found = next(iter(made.module(**got.dense.inputs.fill(inputs)).values()))
        plain = got.model(**inputs, **extra)[0]
        same = next(iter(got.dense(**inputs).values()))
    assert torch.equal(found, wanted)
    assert torch.equal(same, plain)
    assert torch.equal(found, plain) == (name in ("llama", "vit"))  # which have no dropout by default


def test_without_dropout_the_training_mode_is_the_eval_mode(captured: Callable[[str], Captured]) -> None:
    got = captured("bert")
    inputs = inputs_for("bert", 2, 7)
    made = training_graph(got.dense, dropout=False)
    with torch.no_grad():
        assert torch.equal(made.module(**inputs)["last_hidden_state"], got.dense(**inputs)["last_hidden_state"])


class Image(nn.Module):
    """A convolution with batch statistics, and whole channels that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.conv(x))))


def test_batch_normalisation_uses_and_updates_the_statistics_of_batches_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Image().eval(), torch.randn(4, 3, 8, 8)
    program = capture_module(model, {"x": x})
    statistics = running_statistics(program)
    assert statistics == {"norm.running_mean", "norm.running_var"}
    own(program, [], statistics)
    made = training_graph(program)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = twin(x)
        torch.manual_seed(1)
        assert torch.equal(made.module(x=x)["output"], wanted)
    buffers = dict(program.graph_module.named_buffers())
    assert torch.equal(buffers["norm.running_mean"], twin.norm.running_mean)
    assert torch.equal(model.norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]  # a tensor
    frozen = training_graph(program, dropout=False, batch_norm=False)
    with torch.no_grad():
        assert torch.equal(frozen.module(x=x)["output"], program(x=x)["output"])


def test_a_graph_without_its_module_says_that_attention_dropout_is_off(captured: Callable[[str], Captured]) -> None:
    exported = captured("bert").dense.export()
    (note,) = training_graph(capture_exported(exported)).notes
    assert note.startswith("dropout inside attention is off")


class Path_(nn.Module):  # noqa: N801 - a test model
    """Stochastic depth in Python: the eval graph holds no trace of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x[:, :1], 0.5)) if self.training else x


def test_randomness_that_the_graph_does_not_hold_is_noted() -> None:
    program = capture_module(nn.Sequential(nn.Linear(4, 4), Path_()), {"input": torch.randn(3, 4)})
    (note,) = training_graph(program).notes
    assert "1 random operations of the training mode" in note


def test_own_copies_what_is_trained_and_shares_the_rest(captured: Callable[[str], Captured]) -> None:
    got = captured("bert")
    program = got.program
    name = "encoder.layer.0.output.dense.weight"
    before = got.model.get_parameter(name)
    made = own(program, [name])
    assert list(made) == [name]
    assert made[name].requires_grad
    assert torch.equal(made[name], before)
    assert made[name].data_ptr() != before.data_ptr()
    other = dict(program.graph_module.named_parameters())["pooler.dense.weight"]
    assert other.data_ptr() == got.model.get_parameter("pooler.dense.weight").data_ptr()
    assert not other.requires_grad
    with torch.no_grad():
        made[name].add_(1.0)
    inputs = inputs_for("bert", 2, 5)
    assert not torch.equal(program(**inputs)["last_hidden_state"], got.dense(**inputs)["last_hidden_state"])
    assert torch.equal(program.map_of("encoder.layer.0.output.dense").dense().weight, made[name])
