"""The first map at a site turns its nodes into calls; from then on maps are exchanged and the graph stays whole."""

from collections.abc import Callable

import pytest
import torch
from models import Captured, apart, assert_agree, exact_chain, exact_pivoted, inputs_for, low_rank, perceptron
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lrc.errors import SiteError
from lrc.maps import Chain, Dense, LinearMap
from lrc.program import Program, Site
from lrc.program.capture import capture_module

Get = Callable[[str], Captured]
Make = Callable[[Site], LinearMap]
EPS = torch.finfo(torch.float64).eps
EXACT: dict[str, Make] = {
    "dense": lambda site: Dense(*site.map.dense()),
    "chain": exact_chain,
    "pivoted_rows": lambda site: exact_pivoted(site, "out"),
    "pivoted_columns": lambda site: exact_pivoted(site, "in"),
}


def in_float64(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Program]:
    """Return a model and another input in float64, and the program captured of it."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    example, x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return model, x, capture_module(model, (example,))


def tolerance(made: LinearMap, x: Tensor) -> float:
    """How far a product of factors may be from the dense product: the rounding of every sum, relative to what is summed.

    A product of n terms is off by at most n eps times the product of the norms; the factors were rounded and multiply out
    to the weight within the same bound.
    """
    factors = [p for name, p in made.named_parameters() if p.ndim == 2 and name != "bias"]
    norms = torch.stack([torch.linalg.matrix_norm(p.detach().double(), 2).clamp(min=1) for p in factors]).prod()
    terms = sum(max(p.shape) for p in factors)
    return float(4 * terms * EPS * norms * x.detach().double().norm(dim=-1).max())


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 9), (3, 6)),
        (lambda: nn.Linear(9, 6), (3, 4, 9)),
        (lambda: nn.Linear(7, 7, bias=False), (3, 7)),
        (lambda: nn.Linear(6, 1), (3, 6)),
        (lambda: nn.Linear(1, 6), (3, 1)),
        (lambda: Conv1D(9, 6), (3, 4, 6)),
        (lambda: Conv1D(6, 9), (3, 9)),
    ],
    ids=["wide", "tall_3d", "no_bias", "one_row", "one_column", "conv1d_3d", "conv1d"],
)
def test_a_full_rank_map_keeps_the_output(kind: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x, program = in_float64(nn.Sequential(make(), nn.Identity()), *shape)
    made = EXACT[kind](program.sites["0"])
    program.replace("0", made, "test")
    assert program.maps == {"0": made}
    assert program.sites["0"].map is made
    expected = model(x)
    assert apart(program(x)["output"], expected) <= tolerance(made, x)
    assert torch.allclose(
        made.dense().weight, program.sites["0"].original(program.originals).weight, rtol=0, atol=tolerance(made, x)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_full_rank_maps_at_every_site_keep_the_output_of_a_transformer(name: str, captured: Get) -> None:
    made = captured(name)
    program = made.program
    for fqn, site in program.sites.items():
        program.replace(fqn, exact_pivoted(site) if len(fqn) % 2 and site.kind == "linear" else exact_chain(site), settle=False)
    program.settle()
    assert set(program.maps) == set(program.sites)
    inputs = inputs_for(name, 3, 9)
    with torch.no_grad():
        assert_agree(program(**inputs)["logits"], made.dense(**inputs)["logits"], steps=2 * len(program.sites))
    assert not [
        node for node in program.graph_module.graph.nodes if "linear" in str(node.target) or "addmm" in str(node.target)
    ]


def test_the_factors_are_stored_below_the_site_and_the_weight_is_gone() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    assert list(program.graph_module.state_dict()) == ["up.weight", "up.bias", "down.weight"]
    program.replace("up", low_rank(program.sites["up"], 2), "factorize")
    assert set(program.graph_module.state_dict()) == {"up.A", "up.B", "up.bias", "down.weight"}
    assert {name: tuple(t.shape) for name, t in program.tensors().items()} == {
        "up.B": (8, 2), "up.A": (2, 6), "up.bias": (8,), "down.weight": (5, 8),
    }  # fmt: skip
    assert program.size() == (8 * 2 + 2 * 6 + 8 + 5 * 8, 4 * (8 * 2 + 2 * 6 + 8 + 5 * 8))
    assert [str(n.target) for n in program.graph_module.graph.find_nodes(op="get_attr")] == ["down.weight"]
    assert [str(n.target) for n in program.graph_module.graph.find_nodes(op="call_module")] == ["up"]
    program.replace("down", exact_pivoted(program.sites["down"]))
    assert {"down.P", "down.Z", "down.index"} <= set(program.graph_module.state_dict())
    assert program.made_by == {"up": "factorize", "down": ""}


def test_a_map_of_another_shape_is_refused_before_anything_changes() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    before = str(program)
    with pytest.raises(SiteError, match=r"^up: expected a map of shape \(8, 6\), got Dense\[6,8\]"):
        program.replace("up", Dense(torch.zeros(6, 8)))
    assert str(program) == before
    assert program.maps == {}


def test_replacing_twice_leaves_the_second_map_alone() -> None:
    model, x, program = in_float64(perceptron(), 3, 6)
    program.replace("up", low_rank(program.sites["up"], 1), "first")
    made = exact_chain(program.sites["down"])
    program.replace("down", made)
    again = EXACT["dense"](capture_module(model, (x,)).sites["up"])
    program.replace("up", again, "second")
    assert program.maps == {"up": again, "down": made}
    assert program.made_by["up"] == "second"
    assert set(program.graph_module.state_dict()) == {"up.weight", "up.bias", "down.A", "down.B"}
    assert apart(program(x)["output"], model(x)) <= tolerance(made, torch.tanh(x) + 10)


def test_a_clone_has_its_own_graph_and_the_same_tensors() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    x = torch.randn(4, 6)
    program.replace("up", low_rank(program.sites["up"], 2), "factorize")
    text, output = str(program), program(x)["output"]
    twin = program.clone()
    assert str(twin) == text
    assert twin.sites["up"].program is twin
    assert {name: t.data_ptr() for name, t in twin.tensors().items()} == {n: t.data_ptr() for n, t in program.tensors().items()}
    twin.replace("down", low_rank(twin.sites["down"], 1))
    twin.replace("up", low_rank(twin.sites["up"], 1))
    assert str(program) == text
    assert torch.equal(program(x)["output"], output)
    assert list(program.maps) == ["up"]
    assert not torch.equal(twin(x)["output"], output)
    program.replace("down", exact_chain(program.sites["down"]))
    assert repr(twin.maps["down"]) == "Chain[5,1,8]"


def test_a_rewritten_program_is_exported_again() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    program.replace("up", low_rank(program.sites["up"], 2))
    program.replace("down", exact_pivoted(program.sites["down"]))
    exported = program.export()
    assert {"up.A", "up.B", "up.bias", "down.P", "down.Z", "down.index"} == set(exported.state_dict)
    x = torch.randn(7, 6)
    assert_agree(exported.module()(x=x)["output"], program(x)["output"])
    fixed = program.export(static=True)
    assert not fixed.range_constraints


def test_a_reexported_transformer_still_has_dynamic_sizes(captured: Get) -> None:
    program = captured("llama").program
    program.replace("lm_head", low_rank(program.sites["lm_head"], 4))
    program.replace("model.layers.0.mlp.up_proj", exact_pivoted(program.sites["model.layers.0.mlp.up_proj"]))
    inputs = inputs_for("llama", 3, 9)
    with torch.no_grad():
        assert_agree(program.export().module()(**inputs)["logits"], program(**inputs)["logits"])


def test_the_digest_follows_every_number_and_nothing_else() -> None:
    example = torch.randn(3, 6)
    program = capture_module(perceptron(), example)
    digest = program.digest()
    assert len(digest) == 64
    assert digest == program.digest() == program.clone().digest() == capture_module(perceptron(), example).digest()
    program(torch.randn(5, 6))
    assert program.digest() == digest
    seen = {digest}
    other = perceptron()
    with torch.no_grad():
        other.down.weight[4, 7] += 1e-6
    seen.add(capture_module(other, example).digest())
    made = low_rank(program.sites["up"], 2)
    for change in (lambda: program.replace("up", made), lambda: made.A.data[0, 0].neg_(), lambda: made.bias.data[0].add_(1)):
        change()
        seen.add(program.digest())
    program.replace("up", made, "a pass")
    seen.add(program.digest())
    assert len(seen) == 6


class Shared(nn.Module):
    """Two linears with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.second(x)))


def test_uses_with_their_own_biases_keep_them() -> None:
    torch.manual_seed(0)
    model, x, program = in_float64(Shared(), 3, 6)
    made = exact_chain(program.sites["first"])
    program.replace("first", made)
    state = program.graph_module.state_dict()
    assert set(state) == {"first.A", "first.B", "first.bias", "second.A", "second.B", "second.bias"}
    assert state["first.A"].data_ptr() == state["second.A"].data_ptr()
    assert torch.equal(state["second.bias"], model.second.bias)
    norm = float(torch.linalg.matrix_norm(model.first.weight.detach(), 2).clamp(min=1))
    assert apart(program(x)["output"], model(x)) <= 2 * norm * tolerance(made, x)
    assert program.size()[0] == 2 * 36 + 2 * 6  # the factors once, both biases
    program.export()


def test_a_bias_that_a_map_moved_moves_at_every_use() -> None:
    torch.manual_seed(0)
    model, _, program = in_float64(Shared(), 3, 6)
    made = exact_chain(program.sites["first"])
    shift = torch.arange(6.0, dtype=torch.float64)
    made.set_bias(model.first.bias.detach() + shift)
    program.replace("first", made)
    state = program.graph_module.state_dict()
    assert torch.equal(state["first.bias"], model.first.bias + shift)
    assert torch.allclose(state["second.bias"], model.second.bias + shift, rtol=0, atol=8 * EPS * 6)


def test_a_linear_called_on_its_own_output_keeps_the_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    torch.manual_seed(0)
    model, x, program = in_float64(Twice(), 3, 6)
    made = exact_chain(program.sites["fc"])
    program.replace("fc", made)
    norm = float(torch.linalg.matrix_norm(model.fc.weight.detach(), 2).clamp(min=1))
    assert apart(program(x)["output"], model(x)) <= 2 * norm * tolerance(made, x)
    assert [str(n.target) for n in program.graph_module.graph.find_nodes(op="call_module")] == ["fc", "fc"]


class Bare(nn.Module):
    """A parameter multiplied with, under two biases, and read for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(5, 6))
        self.b = nn.Parameter(torch.randn(5))
        self.c = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self.b) - F.linear(x.cos(), self.W, self.c) + self.W.sum(1)


def test_a_bare_parameter_is_replaced_and_what_else_reads_it_is_kept() -> None:
    torch.manual_seed(0)
    model, x, program = in_float64(Bare(), 3, 6)
    assert program.sites["W"].tied == ("sum",)
    made = exact_chain(program.sites["W"])
    program.replace("W", made)
    assert set(program.graph_module.state_dict()) == {"W.A", "W.B", "W.bias", "W_1.A", "W_1.B", "W_1.bias", "W_kept"}
    assert apart(program(x)["output"], model(x)) <= 3 * tolerance(made, x)
    twin = program.clone()
    assert torch.equal(twin(x)["output"], program(x)["output"])
    assert program.unsupported() == ["sum"]
    program.export()


def test_an_embedding_keeps_its_table_when_the_head_that_owns_it_is_replaced() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 9, bias=False)
            self.table = nn.Embedding(9, 6)
            self.table.weight = self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(ids)))

    torch.manual_seed(0)
    model = HeadFirst().double()
    ids = torch.randint(9, (3, 4))
    program = capture_module(model, (ids,))
    made = exact_chain(program.sites["head"])
    program.replace("head", made)
    assert set(program.graph_module.state_dict()) == {"head.A", "head.B", "table.weight"}
    assert program.tensors()["table.weight"].data_ptr() == model.table.weight.data_ptr()
    assert apart(program(ids)["output"], model(ids)) <= tolerance(made, torch.ones(6))


def test_the_projections_of_multihead_attention_are_replaced() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            attended: Tensor = self.attn(x, x, x)[0]
            return attended

    torch.manual_seed(0)
    model, x, program = in_float64(Attention(), 3, 4, 8)
    for fqn in list(program.sites):
        program.replace(fqn, exact_chain(program.sites[fqn]))
    parts = ("attn.in_proj_weight", "attn.out_proj")
    assert set(program.graph_module.state_dict()) == {f"{part}.{name}" for part in parts for name in ("A", "B", "bias")}
    assert_agree(program(x)["output"], model(x), steps=4 * 8)
    assert isinstance(program.maps["attn.in_proj_weight"], Chain)


def test_a_map_may_be_trained_in_the_graph() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    made = low_rank(program.sites["up"], 2)
    program.replace("up", made)
    program(torch.randn(4, 6))["output"].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())
