"""Dependency groups: what is tied on a graph, and that cutting it leaves what the masked model computes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import Captured, inputs_for
from nets import Attending, Gone, group_of, half, image_program, masked
from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.dependency import Groups, cut_units, find_groups
from lrc.program.graft import graft

WITHIN = 1e-6


def agree(program: Program, groups: Groups, gone: Gone, *args: Tensor, **inputs: Tensor) -> Program:
    """Cut a copy of a program, and hold it to the masked one; return it."""
    expected, made = masked(program, groups, gone), program.clone()
    cut_units(made, groups, gone, "prune")
    with torch.no_grad():
        whole, zeros, smaller = (p(*args, **inputs) for p in (program, expected, made))
    for name, value in zeros.items():
        scale = max(1.0, float(value.abs().max()))
        assert (value - whole[name]).abs().max() > 1e-3 * scale, "the masked model is another one"
        assert (smaller[name] - value).abs().max() <= WITHIN * scale
    assert made.size()[0] < program.size()[0]
    return made


@pytest.mark.parametrize("kind", ["residual", "zeros", "separable", "joined", "grouped"])
def test_a_cut_network_is_the_masked_one(kind: str) -> None:
    program, x = image_program(kind)
    groups = find_groups(program)
    made = agree(program, groups, half(groups), x)
    made.export()
    again = find_groups(made)
    assert {g.name for g in again.groups} <= {g.name for g in groups.groups}
    agree(made, again, half(again, 1), x)


def test_the_channels_of_a_group_norms_group_go_together() -> None:
    program, x = image_program("grouped")
    groups = find_groups(program)
    stem = group_of(groups, "stem")
    assert stem.units == 4
    assert next(m.index for m in stem.members if m.slot[1:] == ("stem", "out")).tolist() == np.arange(12).reshape(4, 3).tolist()
    assert groups.reasons["b"] == "group_norm in b_norm normalises over it"
    cut_units(program, groups, {"stem": np.array([1, 2])}, "prune")
    made = graft(program)
    assert isinstance(made.stem_norm, nn.GroupNorm)
    assert made.stem_norm.num_groups == 2
    with torch.no_grad():
        torch.testing.assert_close(made(x), program(x)["output"], rtol=0, atol=1e-6)


ATTENTIONS = [
    {"batch_first": True},
    {},
    {"weights": True},
    {"batch_first": True, "weights": True},
    {"cross": True},
    {"batch_first": True, "bias": False},
]


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_heads_within_the_batch_are_cut_as_the_masked_model(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 20)
    program = capture_module(Attending(**options).eval(), [x])
    groups = find_groups(program)
    heads, features = next(g for g in groups.groups if g.kind == "heads"), group_of(groups, "up")
    assert (heads.units, features.units) == (4, 24)
    packed = next(m.index for m in heads.members if m.slot[2] == "out" and m.slot[1] == heads.name)
    size = 15 if heads.name == "attn.in_proj_weight" else 5
    assert packed.shape == (4, size)
    assert packed[1].tolist() == [start + i for start in range(0, 4 * size, 20) for i in range(5, 10)]
    made = agree(program, groups, half(groups), x)
    with torch.no_grad():
        torch.testing.assert_close(graft(made)(x), made(x)["output"], rtol=0, atol=1e-6)
    agree(made, find_groups(made), half(find_groups(made), 1), torch.randn(4 if "batch_first" in options else 3, 6, 20))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3", "opt", "distilbert", "vit", "t5"])
def test_a_cut_transformer_is_the_masked_one(name: str, captured: Callable[[str], Captured]) -> None:
    program = captured(name).program
    groups = find_groups(program)
    kinds = [g.kind for g in groups.groups]
    assert "heads" in kinds
    assert "features" in kinds
    agree(program, groups, half(groups), **inputs_for(name, 3, 6))


def test_a_hidden_channel_of_a_residual_mlp_is_two_rows_and_a_column() -> None:
    """And a channel of the residual stream is every writer's and every reader's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(3, 5)
            self.fc1, self.fc2 = (
                nn.ModuleList(nn.Linear(5, 7) for _ in range(2)),
                nn.ModuleList(nn.Linear(7, 5) for _ in range(2)),
            )
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for fc1, fc2 in zip(self.fc1, self.fc2, strict=True):
                x = x + fc2(torch.relu(fc1(x)))
            return self.head(x)

    groups = find_groups(capture_module(Block().eval(), [torch.randn(4, 3)]))
    slots = {g.name: {m.slot[1:] for m in g.members} for g in groups.groups}
    assert slots["fc1.0"] == {("fc1.0", "out"), ("fc2.0", "in")}
    stream = {("start", "out"), ("head", "in")} | {(f"fc{i}.{j}", "in" if i == 1 else "out") for i in (1, 2) for j in (0, 1)}
    assert slots["start"] == stream
    hidden = group_of(groups, "fc1.0")
    assert hidden.units == 7
    assert all((m.index == np.arange(7)[:, None]).all() for m in hidden.members)


def test_a_key_goes_with_all_queries_that_read_it(captured: Callable[[str], Captured]) -> None:
    groups = find_groups(captured("llama").program)
    heads = next(g for g in groups.groups if g.kind == "heads")
    index = {m.slot[1].rpartition(".")[2]: m.index for m in heads.members}
    assert heads.units == 2
    assert index["q_proj"].tolist() == [list(range(8)), list(range(8, 16))]
    assert index["k_proj"].tolist() == index["v_proj"].tolist() == [list(range(4)), list(range(4, 8))]
    assert (index["o_proj"] == index["q_proj"]).all()


def test_a_fused_weight_loses_the_head_three_times(captured: Callable[[str], Captured]) -> None:
    groups = find_groups(captured("gpt2").program)
    fused = group_of(groups, "transformer.h.0.attn.c_attn")
    assert fused.members[0].index[1].tolist() == [*range(8, 16), *range(24, 32), *range(40, 48)]


def test_what_is_normalised_over_stays_with_the_reason(captured: Callable[[str], Captured]) -> None:
    reasons = find_groups(captured("vit").program).reasons
    assert reasons["vit.layers.0.mlp.fc2"] == "layer_norm in vit.layers.0.layernorm_before normalises over it"
    assert reasons["classifier"] == "the model gives it as an output"


def test_an_operator_without_a_rule_keeps_what_it_reads() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sort(self.up(x)).values)

    groups = find_groups(capture_module(Sorted().eval(), [torch.randn(3, 4)]))
    assert groups.groups == ()
    assert "sort" in groups.reasons["up"]


def test_the_cut_program_runs_in_the_users_modules(captured: Callable[[str], Captured]) -> None:
    for name in ("llama", "bert", "vit"):
        program = captured(name).program
        groups = find_groups(program)
        cut_units(program, groups, half(groups), "prune")
        inputs = inputs_for(name, 2, 5)
        with torch.no_grad():
            expected = program(**inputs)
            found = graft(program)(**inputs)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_numbers_that_the_users_modules_keep_follow(name: str, captured: Callable[[str], Captured]) -> None:
    """GPT-2 splits at a width, OPT views into a number of heads: both are found by trying, not by name."""
    program = captured(name).program
    groups = find_groups(program)
    notes = cut_units(program, groups, half(groups), "prune")
    assert len(notes) == 1
    assert ("split_size" if name == "gpt2" else "num_heads") in notes[0]
    inputs = inputs_for(name, 2, 5)
    with torch.no_grad():
        expected = program(**inputs)
        found = graft(program)(**inputs)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-6)


def test_code_with_a_size_of_its_own_has_no_place_for_the_cut_maps() -> None:
    program, x = image_program("zeros")
    groups = find_groups(program)
    notes = cut_units(program, groups, half(groups), "prune")
    assert "the graph runs" in notes[0]
    with pytest.raises(LowerError, match="has a size that pruning has changed"):
        graft(program)
    assert program(x)["output"].shape == (3, 5)
