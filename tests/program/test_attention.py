"""`nn.MultiheadAttention`: its projections as sites, and both views of it."""

from typing import Any

import pytest
import torch
from models import assert_agree, exact_chain, low_rank
from torch import Tensor, nn

from lrc.maps import Dense
from lrc.program import Program
from lrc.program.attention import MappedAttention
from lrc.program.capture import capture_module
from lrc.program.graft import graft, share
from lrc.program.owners import place


class Attend(nn.Module):
    """Attention to itself, or to one or two other values."""

    def __init__(self, values: int = 1, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.values = values

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        k, v = {1: (x, x), 2: (y, y), 3: (y, z)}[self.values]
        attended: Tensor = self.attn(x, k, v, need_weights=False)[0]
        return attended + 0 * (y.sum() + z.sum())


def made(values: int = 1, **options: Any) -> tuple[nn.Module, Program, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Attend(values, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    x = torch.randn(3, 4, 8), torch.randn(3, 5, options.get("kdim", 8)), torch.randn(3, 5, options.get("vdim", 8))
    return model, capture_module(model, x), x


SPLIT = "attn.in_proj_weight_0_8", "attn.in_proj_weight_8_24"
CASES: list[tuple[int, dict[str, Any], tuple[str, ...]]] = [
    (1, {}, ("attn.in_proj_weight", "attn.out_proj")),
    (1, {"bias": False}, ("attn.in_proj_weight", "attn.out_proj")),
    (2, {}, (*SPLIT, "attn.out_proj")),
    (3, {}, ("attn.in_proj_weight_0_8", "attn.in_proj_weight_8_16", "attn.in_proj_weight_16_24", "attn.out_proj")),
    (3, {"kdim": 6, "vdim": 5}, ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj")),
]


@pytest.mark.parametrize(("values", "options", "names"), CASES)
def test_projections_are_sites_and_the_two_views_agree(values: int, options: dict[str, Any], names: tuple[str, ...]) -> None:
    model, program, x = made(values, **options)
    assert set(program.sites) == set(names)
    with torch.no_grad():
        expected = model(*x)
        assert_agree(program(*x)["output"], expected)
    for chosen in ([name] for name in names):  # each alone, then all
        twin = program.clone()
        for fqn in chosen:
            twin.replace(fqn, low_rank(twin.sites[fqn], 3))
        grafted = graft(twin)
        with torch.no_grad():
            found = twin(*x)["output"]
            assert_agree(grafted(*x), found)
            assert float((found - expected).abs().max()) > 1e-3
            assert torch.equal(model(*x), expected)
    for fqn in names:
        program.replace(fqn, exact_chain(program.sites[fqn]))
    grafted = graft(program)
    with torch.no_grad():
        assert_agree(grafted(*x), program(*x)["output"])
    assert sum(p.numel() for p in grafted.parameters()) == program.size()[0]
    assert {id(p) for p in grafted.parameters()} == {id(p) for p in program.graph_module.parameters()}


def test_a_weight_of_which_a_part_is_a_map_keeps_the_rest() -> None:
    _, program, _ = made(3)
    fqn = "attn.in_proj_weight_8_16"
    program.replace(fqn, low_rank(program.sites[fqn], 2))
    attention = graft(program).attn
    assert isinstance(attention, MappedAttention)
    assert [name for _, _, name in attention.rows] == [f"in_proj_weight_{i}_{i + 8}" for i in (0, 8, 16)]
    assert not hasattr(attention, "in_proj_weight")


def equal_attention(options: dict[str, Any]) -> tuple[nn.MultiheadAttention, nn.Module]:
    """An attention, and the same one by maps."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.4)
    twin = nn.ModuleDict({"a": share(module)})
    place(twin, "a.in_proj_weight", Dense(module.in_proj_weight, module.in_proj_bias))
    place(twin, "a.out_proj", Dense(module.out_proj.weight, module.out_proj.bias))
    return module, twin["a"]


MASKS: dict[str, Any] = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5, [False, True, False, True, False]])},
    "causal": {"attn_mask": torch.ones(4, 5).triu(1).bool()},
    "added": {"attn_mask": torch.randn(4, 5, generator=torch.Generator().manual_seed(3))},
    "heads": {"attn_mask": torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(4))},
}
MASKS["both"] = MASKS["padding"] | MASKS["causal"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
def test_the_mapped_attention_is_torchs_own(mask: str, options: dict[str, Any], weights: dict[str, Any]) -> None:
    module, mapped = equal_attention(options)
    generator = torch.Generator().manual_seed(1)
    x, y, z = (torch.randn(3, length, 8, generator=generator) for length in (4, 5, 5))
    if not options.get("batch_first"):
        x, y, z = (part.transpose(0, 1) for part in (x, y, z))
    with torch.no_grad():
        expected, expected_weights = module(x, y, z, **MASKS[mask], **weights)
        found, found_weights = mapped(x, y, z, **MASKS[mask], **weights)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == expected.shape
    assert (found_weights is None) == (expected_weights is None)
    if expected_weights is not None:
        assert torch.allclose(found_weights, expected_weights, atol=1e-6)


def test_one_text_without_a_batch_is_attended_to() -> None:
    for batch_first in (False, True):
        module, mapped = equal_attention({"batch_first": batch_first})
        x, y = torch.randn(4, 8), torch.randn(5, 8)
        with torch.no_grad():
            expected, weights = module(x, y, y)
            found, found_weights = mapped(x, y, y)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(found_weights, weights, atol=1e-6)


def test_torchs_transformer_runs_on_mapped_attention() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, batch_first=True).eval()
    x = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    program = capture_module(model, x)
    with torch.no_grad():
        expected = model(*x)
        assert_agree(program(*x)["output"], expected)
    found = {fqn: site.has_module for fqn, site in program.sites.items() if "attn" in fqn}
    assert len(found) == 7
    for fqn in program.sites:
        program.replace(fqn, low_rank(program.sites[fqn], 4))
    grafted = graft(program)
    with torch.no_grad():
        changed = program(*x)["output"]
        assert_agree(grafted(*x), changed)
        assert float((changed - expected).abs().max()) > 1e-3
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        assert grafted(*x, tgt_mask=mask, tgt_is_causal=True).shape == (3, 5, 8)
