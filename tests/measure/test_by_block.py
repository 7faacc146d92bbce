"""Calibration block by block: the same statistics, with the activations of one block at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrc.errors import UsageError
from lrc.measure import collect
from lrc.measure.blocks import activation_bytes, repeated, segments
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.solvers import Need
from tests.models import batches, build, inputs_for

ALL = frozenset({Need.INPUTS, Need.GRADIENTS})
FIELDS = ("gram", "mean", "fisher", "weighted_gram", "weighted_mean")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (0, 1, 1)), ("abc", (0, 3, 1)), ("aaaa", (0, 1, 4)), ("xabcabcabcy", (1, 3, 3)), ("abab", (0, 2, 2)),
        ("eqkvoudqkvoudh", (1, 6, 2)), ("xaabaab", (1, 3, 2)),
    ],
)  # fmt: skip
def test_the_longest_repetition_is_found(words: str, expected: tuple[int, int, int]) -> None:
    assert repeated(words) == expected


def program_of(name: str, layers: int = 3) -> Program:
    """A decoder of several blocks in float64."""
    many = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = build(name, **{many: layers}).double()
    examples = inputs_for(name, 2, 6, padded=False)
    dynamic = {key: {0: "batch", 1: "sequence"} for key in examples}
    return capture_module(model, examples, dynamic=dynamic, constants={"use_cache": False})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_graph_is_cut_between_its_blocks(name: str) -> None:
    program = program_of(name)
    found = segments(program)
    assert [node for part in found for node in part] == list(program.graph_module.graph.nodes)
    before = [0] if name == "gpt2" else []  # of a table that is the head's site, none is found before the first block
    linears = [[n for n in part if n.target in (torch.ops.aten.linear.default, torch.ops.aten.addmm.default)] for part in found]
    each = 7 if name == "llama" else 4
    assert [len(part) for part in linears] == [*before, each, each, each, 1]
    for part in found[1:]:
        inside = set(part)
        crossing = {read for node in part for read in node.all_input_nodes if read not in inside and read.op == "call_function"}
        values = [value for read in crossing if isinstance(value := read.meta["val"], Tensor)]
        wide = [value for value in values if value.is_floating_point() and value.shape[-1] == 16]
        assert len(wide) == 1  # the hidden states alone


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("draws", [1, 2])
def test_statistics_are_those_of_the_whole_graph(name: str, draws: int) -> None:
    program = program_of(name)
    items = [inputs_for(name, 2, 6, seed=seed) for seed in (1, 2)]
    fqns = [fqn for fqn, site in program.sites.items() if not site.tied]
    options: Any = {"fisher": "outputs", "draws": draws, "seed": 3}
    whole = collect(program, batches(*items), fqns, ALL, **options)
    found = collect(program, batches(*items), fqns, ALL, **options, by_block=True)
    assert len(segments(program)) >= 3
    for fqn in fqns:
        assert found[fqn].tokens == whole[fqn].tokens
        for field in FIELDS:
            one, other = getattr(found[fqn], field), getattr(whole[fqn], field)
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()))


class Deep(nn.Module):
    """Blocks with a wide inside."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 8)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Held(TorchDispatchMode):
    """The most bytes of wide tensors that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.ndim == 2 and made.shape[0] == 512:
            storage = made.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                self.storages[key] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, key, None)
            self.most = max(self.most, sum(self.storages.values()))
        return made


def most_held(program: Program, by_block: bool) -> int:
    with Held() as held:
        collect(program, batches({"x": torch.randn(512, 8)}), list(program.sites), ALL, fisher="outputs", by_block=by_block)
    return held.most


def test_memory_does_not_grow_with_the_number_of_blocks() -> None:
    torch.manual_seed(0)
    found = {}
    for blocks in (4, 16):
        program = capture_module(Deep(blocks), torch.randn(512, 8), dynamic={})
        assert len(segments(program)) == blocks + 1
        found[blocks] = most_held(program, False), most_held(program, True)
    wide, narrow = 512 * 256 * 4, 512 * 8 * 4
    assert found[16][0] - found[4][0] >= 12 * wide
    assert found[16][1] - found[4][1] <= 12 * 4 * narrow  # the hidden states between the blocks


def test_what_activations_take_is_told_by_the_graph() -> None:
    program = capture_module(Deep(3), torch.randn(4, 8))
    one = 8 + 2 * 256 + 8
    assert activation_bytes(program, {"x": (100, 8)}) == 3 * 100 * one * 4


def test_what_cannot_be_computed_again_is_refused() -> None:
    program = capture_module(Deep(2), torch.randn(4, 8))
    items = batches({"x": torch.randn(4, 8)})
    needs = frozenset({Need.WEIGHT_FISHER})
    with pytest.raises(
        UsageError, match=r"calibration\.by_block: blocks cannot be computed again: the solver's statistics need"
    ):
        collect(program, items, list(program.sites), needs, fisher="outputs", by_block=True)

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu_()

    program = capture_module(InPlace(), torch.randn(4, 8))
    with pytest.raises(UsageError, match="the graph changes values in place"):
        collect(program, items, ["fc"], ALL, fisher="outputs", by_block=True)
