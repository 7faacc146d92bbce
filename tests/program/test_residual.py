"""The residual stream is found by what the graph computes; what is in the way of a change of basis is named."""

from collections.abc import Callable

import pytest
import torch
from models import Captured, block
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.maps import RmsNorm
from lrc.program import Program
from lrc.program.residual import find_stream

Get = Callable[[str], Captured]


def captured_block(norm: nn.Module, reads: str = "norm") -> Program:
    return lrc.capture(block(norm, reads), {"ids": torch.arange(6).reshape(2, 3)})


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_llama_writes_into_the_stream_twice_a_layer_and_reads_it_behind_norms(name: str, captured: Get) -> None:
    stream = find_stream(captured(name).program)
    layer = "model.layers.0"
    assert [norm.fqn for norm in stream.norms] == [
        f"{layer}.input_layernorm",
        f"{layer}.post_attention_layernorm",
        "model.norm",
    ]
    attention = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    assert stream.readers == {
        **dict.fromkeys(attention, 0), f"{layer}.mlp.gate_proj": 1, f"{layer}.mlp.up_proj": 1, "lm_head": 2,
    }  # fmt: skip
    writers = {f"{layer}.self_attn.o_proj": 1, f"{layer}.mlp.down_proj": 2}
    assert writers.items() <= stream.writers.items()
    assert {**stream.writers, **{module: basis for module, (_, basis) in stream.embeddings.items()}} == {
        **writers, "model.embed_tokens": 0,
    }  # fmt: skip
    assert [(cut.before, cut.after) for cut in stream.shortcuts] == [(0, 1), (1, 2)]
    assert stream.width == 16
    assert not any(norm.centers or norm.bias for norm in stream.norms)


def test_gpt2_has_two_embeddings_in_one_basis_and_norms_that_take_the_mean_off(captured: Get) -> None:
    stream = find_stream(captured("gpt2").program)
    assert stream.writers["transformer.wpe"] == 0
    assert stream.embeddings["transformer.wte"][1] == 0
    assert all(norm.centers and norm.bias for norm in stream.norms)
    assert {norm.eps for norm in stream.norms} == {1e-5}
    assert len(stream.views) == 1  # the one that names the width
    one = stream.in_one_basis()
    assert one.shortcuts == ()
    assert {*one.readers.values(), *one.writers.values()} == {0}


def test_finding_a_stream_changes_nothing(captured: Get) -> None:
    program = captured("llama").program
    before = str(program)
    find_stream(program)
    assert str(program) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "post-norm"),
        ("roberta", "the residual stream cannot be sliced"),
        ("distilbert", "post-norm"),
        ("vit", "the residual stream cannot be sliced"),
        ("t5", "the residual stream cannot be sliced"),
    ],
)
def test_models_whose_stream_has_no_free_basis_are_refused_with_the_reason(name: str, reason: str, captured: Get) -> None:
    with pytest.raises(UsageError, match=reason):
        find_stream(captured(name).program)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, eps=1e-3), nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8, elementwise_affine=False)]
)
def test_norms_as_one_operation_are_found(norm: nn.Module) -> None:
    stream = find_stream(captured_block(norm))
    assert {n.centers for n in stream.norms} == {isinstance(norm, nn.LayerNorm)}
    assert {n.weight is None for n in stream.norms} == {not list(norm.parameters())}
    assert stream.readers == {"up": 0, "head": 1}
    assert stream.writers == {"table": 0, "down": 1}


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ("raw", "head"),
        ("tanh", "tanh"),
        ("relu", "what last gives is read by relu, which is no linear layer"),
    ],
)
def test_the_operation_in_the_way_is_named(reads: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_stream(captured_block(nn.RMSNorm(8), reads))


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(UsageError, match="no linear layer reads a normalised value"):
        find_stream(captured_block(nn.Identity()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_without_numbers_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = nn.RMSNorm(8, eps=1e-4, elementwise_affine=False)(x.double() if dtype == torch.float64 else x.float())
    found = RmsNorm(8, 1e-4)(x)
    assert found.dtype == dtype
    assert float((found.to(wanted) - wanted).abs().max()) <= 8 * torch.finfo(dtype).eps * float(wanted.abs().max())


def test_a_norm_of_a_narrower_stream_divides_by_the_features_that_there_were() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 5:] = 0
    assert torch.allclose(RmsNorm(8, 1e-4)(x[:, :5]), RmsNorm(8, 1e-4)(x)[:, :5])


class Functional(nn.Module):
    """A block that normalises by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.up, self.down = nn.Parameter(torch.ones(8)), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(nn.functional.rms_norm(x, (8,), self.scale))))


def test_a_norm_that_is_part_of_a_larger_module_is_refused_lest_that_be_replaced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), Functional(), nn.RMSNorm(8), nn.Linear(8, 3)).eval()
    with pytest.raises(UsageError, match="the norm rms_norm is no module of its own: 1 does more"):
        find_stream(lrc.capture(model, (torch.arange(6).reshape(2, 3),)))
