"""The second view: the same maps in a module tree like the user's, whose own tree stays as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import Captured, assert_agree, exact_chain, factorized, inputs_for, low_rank, outputs_of, perceptron
from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.maps import Chain
from lrc.program.capture import capture_graph, capture_module
from lrc.program.graft import graft

Get = Callable[[str], Captured]


READS_WO = tuple(f"{part}.block.0.layer.{i}.DenseReluDense.wo" for part, i in (("encoder", 1), ("decoder", 2)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_two_views_agree(name: str, captured: Get) -> None:
    program = factorized(captured(name).program, ignore=READS_WO)
    model = graft(program)
    for batch, length in ((3, 9), (1, 4)):
        inputs = inputs_for(name, batch, length)
        with torch.no_grad():
            found = program(**inputs)
        expected = outputs_of(model, inputs)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_agree(found[key], value)
        if "logits" in found:
            assert torch.equal(found["logits"].argmax(-1), expected["logits"].argmax(-1))


def test_a_layer_whose_weight_the_models_code_looks_at_runs(captured: Get) -> None:
    program = captured("t5").program
    program.replace(READS_WO[0], low_rank(program.sites[READS_WO[0]], 3))
    inputs = inputs_for("t5", 2, 4)
    with torch.no_grad():
        assert_agree(graft(program)(**inputs, use_cache=False).logits, program(**inputs)["logits"])


def test_code_that_pads_by_a_convolutions_stride_and_kernel_runs() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            pad = self.conv.kernel_size[0] - self.conv.stride[0]
            assert (self.conv.dilation, self.conv.padding) == ((1, 1), (0, 0))
            return self.head(self.conv(nn.functional.pad(x, (0, pad, 0, pad))).mean((2, 3)))

    x = torch.randn(2, 3, 8, 8)
    program = capture_module(Padded().eval(), [x])
    program.replace("conv", program.sites["conv"].map)
    with torch.no_grad():
        assert_agree(graft(program)(x), program(x)["output"])
        assert_agree(graft(program, graft(program))(x), program(x)["output"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generating_with_and_without_a_cache_gives_the_same_tokens(name: str, captured: Get) -> None:
    program = factorized(captured(name).program)
    model = graft(program)
    inputs = inputs_for(name, 3, 6, padded=False)
    made = {}
    for cache in (True, False):
        made[cache] = model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=cache)
    assert torch.equal(made[True], made[False])
    ids = inputs["input_ids"]
    for _ in range(3):  # the graph alone, greedily
        with torch.no_grad():
            logits = program(input_ids=ids)["logits"][:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens: no end of the text
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made[True][:, : ids.shape[1]], ids)


def test_the_users_model_is_untouched(captured: Get) -> None:
    made = captured("llama")
    inputs = inputs_for("llama", 2, 5)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    modules = dict(made.model.named_modules())
    output, config = outputs_of(made.model, inputs)["logits"], made.model.config.to_dict()
    model = graft(factorized(made.program))
    assert type(model) is type(made.model)
    assert dict(made.model.named_modules()) == modules
    assert made.model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert torch.equal(outputs_of(made.model, inputs)["logits"], output)
    assert not torch.equal(outputs_of(model, inputs)["logits"], output)


def test_what_no_pass_touched_is_shared_with_the_users_model(captured: Get) -> None:
    made = captured("llama")
    program = made.program
    program.replace("model.layers.0.mlp.up_proj", low_rank(program.sites["model.layers.0.mlp.up_proj"], 3))
    model = graft(program)
    own = dict(made.model.named_parameters())
    for name, parameter in model.named_parameters():
        if ".mlp.up_proj." in name and ".0." in name:
            assert name.rpartition(".")[2] in {"A", "B"}
        else:
            assert parameter is own[name]
    assert model.model.layers[0].mlp.up_proj is program.maps["model.layers.0.mlp.up_proj"]  # type: ignore[union-attr, index]


def test_training_one_view_trains_the_other() -> None:
    program = factorized(capture_module(perceptron(), torch.randn(3, 6)), rank=3)
    model, x = graft(program), torch.randn(7, 6)
    before = program(x)["output"].detach()
    for trained, tensors in ((model, list(model.parameters())), (program, list(program.tensors().values()))):
        optimizer = torch.optim.SGD(tensors, lr=0.1)
        optimizer.zero_grad()
        loss = model(x).square().sum() if trained is model else program(x)["output"].square().sum()
        loss.backward()
        optimizer.step()
        after = program(x)["output"].detach()
        assert not torch.allclose(after, before)
        assert_agree(after, model(x))
        before = after


class Shared(nn.Module):
    """Two linears with one weight and biases of their own, and one linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(self.second(x)))
        return self.again(torch.relu(self.again(x)))


def test_weights_used_more_than_once_stay_shared_in_both_views() -> None:
    torch.manual_seed(0)
    user, x = Shared(), torch.randn(7, 6)
    program = factorized(capture_module(user, torch.randn(3, 6)), rank=2)
    model = graft(program)
    assert_agree(program(x)["output"], model(x))
    assert model.first.A is model.second.A
    assert not torch.equal(model.first.bias, model.second.bias)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.second.bias, user.second.bias)
    assert_agree(program(x)["output"], model(x))  # the biases of both uses too


def test_a_head_with_a_map_of_its_own_is_untied_from_the_embedding(captured: Get) -> None:
    made = captured("llama")
    program = made.program
    program.replace("model.layers.0.mlp.up_proj", low_rank(program.sites["model.layers.0.mlp.up_proj"], 3))
    assert graft(program).config.tie_word_embeddings is True  # type: ignore[union-attr]
    program.replace("lm_head", low_rank(program.sites["lm_head"], 4))
    model = graft(program)
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert isinstance(model.lm_head, Chain)
    assert model.model.embed_tokens.weight is made.model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert made.model.config.tie_word_embeddings is True  # type: ignore[union-attr]


def test_ties_that_a_config_cannot_undo_are_forgotten_by_the_new_tree_alone(captured: Get) -> None:
    made = captured("t5")
    program = made.program
    program.replace("lm_head", low_rank(program.sites["lm_head"], 4))
    model = graft(program)
    assert model.config.tie_word_embeddings is True  # type: ignore[union-attr]
    model.tie_weights()  # type: ignore[operator]
    assert list(model.lm_head.state_dict()) == ["B", "A"]  # type: ignore[union-attr]
    assert "lm_head.weight" in made.model.all_tied_weights_keys  # type: ignore[operator]


def test_maps_take_the_mode_of_the_module_they_replace() -> None:
    user = perceptron().train()
    user.down.eval()
    program = factorized(capture_module(user, torch.randn(3, 6)))
    model = graft(program)
    assert (model.training, model.up.training, model.down.training) == (True, True, False)


def test_any_module_of_the_same_tree_can_be_grafted_into() -> None:
    program = factorized(capture_module(perceptron(), torch.randn(3, 6)))
    other = copy.deepcopy(perceptron())
    with torch.no_grad():
        other.up.weight.zero_()
    x = torch.randn(4, 6)
    assert_agree(graft(program, other)(x), program(x)["output"])
    assert not other.up.weight.any()


def test_a_graph_module_is_grafted_too() -> None:
    program = factorized(capture_graph(torch.fx.symbolic_trace(perceptron()), torch.randn(3, 6)))
    x = torch.randn(4, 6)
    assert_agree(graft(program)(x), program(x)["output"])


def test_a_bare_parameter_cannot_be_grafted() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.matrix)

    program = capture_module(Bare(), torch.randn(3, 8))
    graft(program)  # nothing to put in place yet
    program.replace("matrix", exact_chain(program.sites["matrix"]))
    with pytest.raises(LowerError, match=r"^matrix: the weight is a parameter of a larger module, which calls it by itself"):
        graft(program)


def test_another_module_or_none_is_refused() -> None:
    program = factorized(capture_module(perceptron(), torch.randn(3, 6)))
    with pytest.raises(LowerError, match=r"^up: the module to graft into has no submodule of this name"):
        graft(program, nn.Linear(6, 5))
    program.origin = type(program.origin)(name="mine")
    with pytest.raises(LowerError, match=r"^mine: there is no module to graft into. Give the module, or use `.module`"):
        graft(program)
