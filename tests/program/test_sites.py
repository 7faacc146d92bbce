"""The linears of a graph are found by what its nodes compute, and named as the model names its modules."""

from collections.abc import Callable

import pytest
import torch
from models import ARCHITECTURES, Captured, assert_agree, build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lrc.errors import SiteError
from lrc.program import Program, Site
from lrc.program.capture import capture_exported, capture_module

Get = Callable[[str], Captured]
LINEARS = (nn.Linear, Conv1D)


def capture(model: nn.Module, *inputs: Tensor) -> Program:
    return capture_module(model, inputs)


def uses(site: Site) -> list[tuple[str, str | None]]:
    return [(use.module, use.bias) for use in site.uses]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_are_the_linear_modules_of_the_model_in_its_order(name: str, captured: Get) -> None:
    made = captured(name)
    modules = {fqn: module for fqn, module in made.model.named_modules() if isinstance(module, LINEARS)}
    sites = {fqn: site for fqn, site in made.dense.sites.items() if site.kind == "linear"}
    assert list(sites) == list(modules)
    for fqn, site in sites.items():
        module = modules[fqn]
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert site.shape == tuple(weight.shape) == (site.out_features, site.in_features)
        assert site.transposed == isinstance(module, Conv1D)
        assert site.type_name == type(module).__name__
        assert site.has_module
        assert torch.equal(site.map.dense().weight, weight)
        assert (site.bias is None) == (module.bias is None)
        assert site.bias is None or torch.equal(site.bias, module.bias)


def test_gpt2_has_one_transposed_site_for_queries_keys_and_values(captured: Get) -> None:
    site = captured("gpt2").dense.sites["transformer.h.0.attn.c_attn"]
    assert (site.shape, site.transposed, site.type_name) == ((48, 16), True, "Conv1D")
    assert uses(site) == [("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn.bias")]


def test_grouped_queries_have_narrow_keys_and_values(captured: Get) -> None:
    sites = captured("llama").dense.sites
    shapes = [sites[f"model.layers.0.self_attn.{part}_proj"].shape for part in "qkvo"]
    assert shapes == [(16, 16), (8, 16), (8, 16), (16, 16)]


@pytest.mark.parametrize(("name", "head"), [("llama", "lm_head"), ("gpt2", "lm_head"), ("roberta", "lm_head.decoder")])
def test_a_head_that_shares_the_embedding_says_so(name: str, head: str, captured: Get) -> None:
    program = captured(name).dense
    assert program.sites[head].tied == ("embedding",)
    assert all(site.tied == () for fqn, site in program.sites.items() if fqn != head)
    assert captured("mistral").dense.sites["lm_head"].tied == ()


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("decomposed", [False, True], ids=["plain", "decomposed"])
def test_linears_are_found_whatever_the_number_of_dimensions(shape: tuple[int, ...], decomposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), Conv1D(3, 4)).eval()
    x = torch.randn(shape)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    program = capture_exported(exported.run_decompositions() if decomposed else exported)
    found = [(s.fqn, s.shape, s.transposed, s.type_name, uses(s)) for s in program.sites.values()]
    assert found == [
        ("0", (5, 6), False, "Linear", [("0", "0.bias")]),
        ("2", (4, 5), False, "Linear", [("2", None)]),
        ("3", (3, 4), True, "Conv1D", [("3", "3.bias")]),
    ]
    nodes = program.nodes
    assert [nodes[s.uses[0].input].meta["val"].ndim for s in program.sites.values()] == [len(shape)] * 3
    assert [nodes[s.uses[0].node].meta["val"].ndim for s in program.sites.values()] == [len(shape)] * 3
    assert program.unsupported() == []


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_that_decompositions_spread_over_a_batch_is_one_site(bias: bool) -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x.transpose(0, 1)))  # memory out of order: torch multiplies sample by sample

    torch.manual_seed(0)
    model, x = Swapped().eval(), torch.randn(4, 3, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).run_decompositions()
    assert "bmm" in str(exported.graph)
    program = capture_exported(exported)
    site = program.sites["fc"]
    assert (site.shape, site.transposed, uses(site)) == ((5, 6), False, [("fc", "fc.bias" if bias else None)])
    assert program.unsupported() == []
    program.replace("fc", site.map)
    x = torch.randn(7, 3, 6)
    assert_agree(program(x)["output"], model(x))


class Twice(nn.Module):
    """One linear, called on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


class Shared(nn.Module):
    """Two linears with one weight and biases of their own; the second one runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.second(x)))


def test_a_linear_called_twice_is_one_site_with_two_uses() -> None:
    site = capture(Twice(), torch.randn(3, 6)).sites["fc"]
    assert uses(site) == [("fc", "fc.bias"), ("fc", "fc.bias")]
    assert site.uses[1].input == site.uses[0].node


def test_two_linears_with_one_weight_are_one_site_with_their_own_biases() -> None:
    program = capture(Shared(), torch.randn(3, 6))
    assert list(program.sites) == ["first"]
    site = program.sites["first"]
    assert uses(site) == [("first", "first.bias"), ("second", "second.bias")]
    assert site.weight_name == "first.weight"
    assert program.position("first") == list(program.nodes).index(site.uses[1].node)


class Functional(nn.Module):
    """Owns a weight, calls it by itself, and does more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scale


def test_a_weight_that_its_module_calls_by_itself_is_named_as_the_parameter() -> None:
    program = capture(nn.Sequential(Functional()), torch.randn(3, 6))
    site = program.sites["0.weight"]
    assert (site.shape, site.type_name, site.has_module) == ((5, 6), "Parameter", False)


def test_a_module_that_only_multiplies_by_its_weight_is_a_module_of_its_own() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    site = capture(nn.Sequential(Plain()), torch.randn(3, 6)).sites["0"]
    assert (site.shape, site.type_name, site.has_module) == ((5, 6), "Plain", True)


def test_uses_of_a_bare_parameter_with_different_biases_are_told_apart() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(5, 6))
            self.b = nn.Parameter(torch.randn(5))
            self.c = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.W, self.b) - F.linear(2 * x, self.W, self.c) + F.linear(3 * x, self.W, self.b)

    site = capture(Biased(), torch.randn(3, 6)).sites["W"]
    assert uses(site) == [("W", "b"), ("W_1", "c"), ("W", "b")]
    assert not site.has_module


def test_a_weight_that_another_module_borrows_is_no_module_of_its_own() -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight)

    site = capture(Borrowing(), torch.randn(3, 6)).sites["fc"]
    assert uses(site) == [("fc", "fc.bias"), ("fc_1", None)]
    assert not site.has_module


def test_the_projections_of_multihead_attention_are_sites_without_modules() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            attended: Tensor = self.attn(x, x, x)[0]
            return attended

    sites = capture(Attention(), torch.randn(3, 4, 8)).sites
    assert {fqn: (site.shape, site.has_module) for fqn, site in sites.items()} == {
        "attn.in_proj_weight": ((24, 8), False),
        "attn.out_proj": ((8, 8), False),
    }
    assert uses(sites["attn.in_proj_weight"]) == [("attn.in_proj_weight", "attn.in_proj_bias")]


def test_products_that_are_no_sites_are_told_as_unsupported() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))
            self.conv = nn.ConvTranspose1d(6, 4, 3)
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, ids: Tensor) -> Tensor:
            h = self.conv(self.table[ids].sum(1)[..., None])
            return h.transpose(1, 2) * self.matrix.sum()

    program = capture(Others(), torch.randint(9, (3, 8)))
    assert program.sites == {}
    assert program.unsupported() == ["conv_transpose1d", "index", "sum"]


def test_an_unknown_site_is_an_error_with_its_name(captured: Get) -> None:
    with pytest.raises(SiteError, match=r"nowhere: the captured graph has no site of this name. `lrc inspect` lists them"):
        captured("bert").dense.site("nowhere")


def test_a_site_shares_the_memory_of_the_models_weight_and_is_frozen() -> None:
    model = build("gpt2")
    program = capture_module(model, {"input_ids": torch.randint(9, (2, 4))}, constants={"use_cache": False})
    weight = model.transformer.h[0].mlp.c_fc.weight  # type: ignore[union-attr, index]
    made = program.sites["transformer.h.0.mlp.c_fc"].map
    assert made.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in made.parameters())
