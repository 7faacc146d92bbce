"""Two programs side by side: what a site sees behind compressed ones, and its product with what it saw before."""

from collections.abc import Callable

import pytest
import torch
from models import Captured, batches, inputs_for, low_rank
from torch import Tensor, nn

from lrc.data import Batches
from lrc.measure import Lockstep
from lrc.measure.lockstep import Stepper
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.graft import graft
from lrc.solvers import Moments

Get = Callable[[str], Captured]
EPS = torch.finfo(torch.float64).eps


def agree(found: Tensor | None, expected: Tensor, terms: int = 100) -> bool:
    assert found is not None
    assert found.dtype == torch.float64
    return float((found - expected).abs().max()) <= 8 * terms * EPS * max(float(expected.abs().max()), 1e-300)


def in_graph_order(program: Program) -> list[str]:
    return sorted((fqn for fqn, site in program.sites.items() if site.kind == "linear"), key=program.position)


@pytest.fixture
def gpt2(doubled: Callable[[str], Program]) -> Program:
    return doubled("gpt2")


@pytest.fixture
def items() -> Batches:
    return batches(inputs_for("gpt2", 3, 9), inputs_for("gpt2", 1, 4, seed=2))


def inputs_of(model: nn.Module, fqn: str, items: Batches) -> Tensor:
    """Return the unpadded rows that a module of a transformers model reads, by a hook."""
    seen: list[Tensor] = []
    mask = torch.ones(0)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(args[0].detach()[mask.bool()])

    handle = model.get_submodule(fqn).register_forward_hook(hook)
    try:
        for item in items:
            mask = item["attention_mask"]
            with torch.no_grad():
                model(**item, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(seen)


def test_identical_programs_see_the_same_on_both_sides(gpt2: Program, items: Batches) -> None:
    walk = Lockstep(gpt2, gpt2.clone(), items)
    fisher = torch.eye(3)
    for fqn in in_graph_order(gpt2):
        moments = walk.advance_to(fqn, Moments(fisher=fisher))
        assert moments.gram is not None
        assert agree(moments.cross, moments.gram)
        assert agree(moments.dense_mean, moments.mean)
        assert moments.fisher is fisher
        assert moments.tokens == sum(int(item["attention_mask"].sum()) for item in items)


def test_behind_compressed_sites_the_moments_are_those_of_hooks_on_both_models(gpt2: Program, items: Batches) -> None:
    compressed = gpt2.clone()
    walk = Lockstep(gpt2, compressed, items)
    assert gpt2.origin.model is not None
    for fqn in in_graph_order(gpt2):
        moments = walk.advance_to(fqn, Moments())
        x = inputs_of(gpt2.origin.model, fqn, items)
        seen = inputs_of(graft(compressed), fqn, items)
        assert agree(moments.gram, seen.T @ seen / len(seen), 1000)
        assert agree(moments.mean, seen.mean(0), 1000)
        assert agree(moments.cross, x.T @ seen / len(x), 1000)
        assert agree(moments.dense_mean, x.mean(0), 1000)
        assert moments.tokens == len(seen)
        if compressed.maps:
            assert not torch.allclose(x, seen)
        compressed.replace(fqn, low_rank(compressed.sites[fqn], 3))  # the graph changes beyond what has run


def test_sites_that_read_the_same_value_get_the_same_tensors(captured: Get) -> None:
    program = captured("llama").program
    walk = Lockstep(captured("llama").dense, program, batches(inputs_for("llama", 2, 5)))
    layer = "model.layers.0.self_attn"
    found = []
    for part in "qkv":
        fqn = f"{layer}.{part}_proj"
        found.append(walk.advance_to(fqn, Moments()))
        program.replace(fqn, low_rank(program.sites[fqn], 2))
    assert found[0].gram is found[1].gram is found[2].gram
    assert found[0].cross is found[2].cross


class Shared(nn.Module):
    """Two linears with one weight, of which the second one in the model runs first; another one runs between them."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(6, 6)
        self.early = nn.Linear(6, 6)
        self.early.weight = self.late.weight
        self.middle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(torch.tanh(self.middle(torch.tanh(self.early(torch.sin(x))))))


def test_a_weight_that_is_used_twice_is_fitted_where_it_is_first_used() -> None:
    torch.manual_seed(0)
    model = Shared().double()
    program = capture_module(model, torch.randn(2, 6, dtype=torch.float64))
    x = torch.randn(9, 6, dtype=torch.float64)
    compressed = program.clone()
    walk = Lockstep(program, compressed, batches({"x": x}))
    assert in_graph_order(program) == ["late", "middle"]
    first = walk.advance_to("late", Moments())
    reads = torch.sin(x)
    assert agree(first.gram, reads.T @ reads / 9)
    assert agree(first.cross, reads.T @ reads / 9)
    compressed.replace("late", low_rank(compressed.sites["late"], 2))
    between = walk.advance_to("middle", Moments())
    dense = torch.tanh(model.early(reads)).detach()
    small = torch.tanh(compressed.placed("late")["early"](reads)).detach()
    assert agree(between.gram, small.T @ small / 9)
    assert agree(between.cross, dense.T @ small / 9)
    assert agree(between.mean, small.mean(0))
    assert agree(between.dense_mean, dense.mean(0))


def test_a_stepper_runs_every_node_once_and_holds_only_what_is_still_read(gpt2: Program) -> None:
    item = inputs_for("gpt2", 2, 5)
    stepper = Stepper(gpt2, item)
    runs: list[str] = []
    run = stepper._run
    stepper._run = lambda runner, node: (runs.append(node.name), run(runner, node))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        for fqn in in_graph_order(gpt2):
            stepper.advance_to(gpt2.sites[fqn].uses[0].input)
            order = {node.name: i for i, node in enumerate(gpt2.graph_module.graph.nodes)}
            here = order[gpt2.sites[fqn].uses[0].input]
            for held in set(stepper.values) - {gpt2.sites[fqn].uses[0].input}:
                assert any(order[user.name] > here for user in gpt2.nodes[held].users)
    assert len(runs) == len(set(runs))
