"""Which linears belong together: alike layers, MLPs, attentions; found by dataflow on models of several kinds."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.program import Program
from lrc.program.alike import alike, is_added_back
from lrc.program.modules import linked_sites
from lrc.solvers.groups import fused_rows


def linears(program: Program) -> list[str]:
    return [fqn for fqn, site in program.sites.items() if site.kind == "linear"]


def kinds(program: Program) -> dict[str, tuple[str, ...]]:
    groups = linked_sites(program, linears(program))
    return {found.kind: tuple(name.rpartition(".")[2] for name in found.sites) for found in groups}


def test_a_decoder_has_an_mlp_and_both_pairs_of_its_attention(llama: Path) -> None:
    program = lrc.capture(llama)
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert kinds(program) == {"vo": ("v_proj", "o_proj"), "qk": ("q_proj", "k_proj"), "mlp": mlp}
    facts = {found.kind: found.facts for found in linked_sites(program, linears(program))}
    assert facts["vo"] == {"heads": 4, "kv_heads": 2, "size": 8, "together": 1}
    assert facts["qk"] == facts["vo"] | {"together": 2, "rotary": 8, "interleaved": 0}
    assert not program.maps


def test_an_encoder_turns_no_features(bert: Path) -> None:
    program = lrc.capture(bert)
    assert kinds(program) == {"vo": ("value", "dense"), "qk": ("query", "key"), "mlp": ("dense", "dense")}
    (facts,) = [found.facts for found in linked_sites(program, linears(program)) if found.kind == "qk"]
    assert (facts["rotary"], facts["together"]) == (0, 1)


def test_a_fused_linear_of_queries_keys_and_values_makes_one_group_with_the_output(gpt2: Path) -> None:
    program = lrc.capture(gpt2)
    assert kinds(program) == {"mlp": ("c_fc", "c_proj"), "qkvo": ("c_attn", "c_proj")}
    (facts,) = [found.facts for found in linked_sites(program, linears(program)) if found.kind == "qkvo"]
    assert (facts["heads"], facts["kv_heads"], facts["size"], facts["together"]) == (2, 2, 16, 1)
    rows = torch.cat([fused_rows(facts, role) for role in "qkv"])
    assert torch.equal(rows, torch.arange(96))


class Fused(nn.Module):
    """Heads of queries, their keys and values from one linear, group by group."""

    def __init__(self, kv_heads: int, *, ragged: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.ragged = kv_heads, ragged
        self.qkv, self.o = nn.Linear(8, 4 * (4 + 2 * kv_heads)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x).view(b, t, self.kv_heads, -1, 4)
        y = y.flip(3) if self.ragged else y
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in y.split([4 // self.kv_heads, 1, 1], 3))
        k, v = (part.repeat_interleave(4 // self.kv_heads, 1) for part in (k, v))
        z = F.scaled_dot_product_attention(0.5 * q, k, v, is_causal=True, scale=1.0)
        return self.o(z.transpose(1, 2).reshape(b, t, 16))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_fused_linear_may_go_from_group_to_group(kv_heads: int) -> None:
    program = lrc.capture(Fused(kv_heads).eval(), {"x": torch.randn(2, 5, 8)})
    (found,) = linked_sites(program, linears(program))
    assert (found.kind, found.sites) == ("qkvo", ("qkv", "o"))
    shared = 4 // kv_heads
    rows = torch.arange(4 * (4 + 2 * kv_heads)).view(kv_heads, shared + 2, 4)
    for role, part in zip("qkv", rows.split([shared, 1, 1], 1), strict=True):
        assert torch.equal(fused_rows(found.facts, role), part.flatten())


def test_a_fused_linear_in_another_order_is_in_no_group() -> None:
    program = lrc.capture(Fused(2, ragged=True).eval(), {"x": torch.randn(2, 5, 8)})
    assert linked_sites(program, linears(program)) == []


class Attention(nn.Module):
    """One attention; `kind` says what it does with its queries, or with its values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "interleaved":
            angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
            q, k = (turned(y, angle.cos(), angle.sin()) for y in (q, k))
        if self.kind == "scaled":
            q = q * 0.25
        if self.kind == "normed":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.kind == "gated":
            v = torch.relu(v)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.o(y) + (self.v(x) if self.kind == "read twice" else 0)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("plain", {"vo", "qk"}),
        ("interleaved", {"vo", "qk"}),
        ("scaled", {"vo", "qk"}),
        ("normed", {"vo"}),
        ("gated", {"qk"}),
        ("read twice", {"qk"}),
    ],
)
def test_only_what_moves_features_unchanged_is_linked(kind: str, wanted: set[str]) -> None:
    torch.manual_seed(0)
    program = lrc.capture(Attention(kind).eval(), {"x": torch.randn(2, 5, 8)})
    found = {linked.kind: linked.facts for linked in linked_sites(program, linears(program))}
    assert set(found) == wanted
    if kind == "interleaved":
        assert (found["qk"]["rotary"], found["qk"]["interleaved"]) == (4, 1)


def test_what_is_not_asked_for_is_in_no_module(llama: Path) -> None:
    program = lrc.capture(llama)
    some = [name for name in linears(program) if not name.endswith(("up_proj", "o_proj"))]
    assert {found.kind for found in linked_sites(program, some)} == {"qk"}


def test_alike_layers_run_from_block_to_block(tmp_path: Path) -> None:
    program = lrc.capture(tiny.write_llama(tmp_path / "llama", num_hidden_layers=3))
    some = [name for name in linears(program) if name != "model.layers.1.mlp.up_proj"]
    runs = {run[0].rpartition(".")[2]: run for run in alike(program, some)}
    assert runs["q_proj"] == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    assert runs["up_proj"] == ("model.layers.2.mlp.up_proj",)  # the block between is missing
    assert runs["lm_head"] == ("lm_head",)
    back = {name.rpartition(".")[2] for name in linears(program) if is_added_back(program, name)}
    assert back == {"o_proj", "down_proj"}
