"""SLTrain: the product with low-rank plus sparse weights, its backward pass, its start, and training by a spec."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.errors import UsageError
from lrc.maps import Chain, Dense, Scale, Sparse, SparseLowRank, fold, restore
from lrc.maps.sparse_low_rank import Places, SparseLowRankLinear
from lrc.program import Program
from lrc.solvers.base import Moments
from lrc.solvers.splits import BUILTIN as SPLITTERS
from lrc.solvers.splits.base import Split
from lrc.solvers.splits.sltrain import SltrainSplitter
from lrc.spec.registry import RECIPES
from lrc.train.recipes import Context
from lrc.train.recipes.sltrain import SltrainRecipe

SPLIT = {"type": "split", "solver": {"type": "sltrain", "start": "random", "alpha": 6.0}, "rank": 2}


def started(shape: tuple[int, int], rank: int, seed: int = 0, *, dtype: torch.dtype = torch.float64, **options: Any) -> Split:
    """Return the random start of a weight."""
    split = next(rule for rule in SPLITTERS if rule.name == "sltrain")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    given = SltrainSplitter(start="random", **options)
    made = split.function(weight, Moments(), rank, given, torch.Generator().manual_seed(seed))
    assert isinstance(made, Split)
    return made


def layer(shape: tuple[int, int], rank: int, seed: int = 0, *, trained: bool = True, **options: Any) -> SparseLowRank:
    """Return a layer with a bias; `trained`: with numbers in B too."""
    found = started(shape, rank, seed, **options)
    generator = torch.Generator().manual_seed(seed + 2)
    if trained:
        found.B.normal_(generator=generator)
    assert found.support is not None
    bias = torch.randn(shape[0], generator=generator).to(found.A.dtype)
    return SparseLowRank(
        Scale(Chain(found.B, found.A), found.scaling),
        Sparse.of(found.rest, found.support),
        names=("low_rank", "rest"),
        bias=bias,
    )


def inputs(features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, features, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("density", [0.02, 0.3])  # stored as positions, and as a mask
def test_at_the_start_the_layer_is_its_sparse_part_which_has_just_so_many_numbers(density: float) -> None:
    made = layer((40, 30), 4, density=density, alpha=8.0, trained=False)
    S = made.slots[1].dense().weight
    assert int((made.dense().weight != 0).sum()) == int(density * 1200) == made.rest.count
    x = inputs(30)
    for mode in (True, False):
        made.train(mode)
        assert torch.allclose(made(x), F.linear(x, S, made.bias), rtol=0, atol=1e-14)
    assert torch.equal(made.dense().weight, S)
    assert float(S.abs().max()) <= 1 / math.sqrt(30)
    assert float(made.low_rank.inner.A.detach().abs().max()) <= 1 / math.sqrt(30)
    assert made.low_rank.scale == 2.0


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("trained_scale", [True, False])
def test_the_backward_pass_is_that_of_the_dense_expression(density: float, trained_scale: bool) -> None:
    made = layer((5, 4), 2, density=density)
    B, A = (p.detach().clone().requires_grad_() for p in made.low_rank.inner.slots)
    values = made.rest.values.detach().clone().requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True) if trained_scale else 0.7
    places = Places(made.rest.spread, made.rest.gathered)

    def ours(x: Tensor, *given: Any) -> Tensor:
        y: Tensor = SparseLowRankLinear.apply(x, *given, places)
        return y

    x = inputs(4)[:, :1].requires_grad_()
    given = (x, bias, B, A, values, scale)
    y = ours(*given)
    dense = F.linear(x, scale * (B @ A) + made.rest.spread(values), bias)
    assert torch.allclose(y, dense, atol=1e-12)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [t for t in given if isinstance(t, Tensor)]
    for own, expected in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(dense, wanted, g), strict=True):
        assert torch.allclose(own, expected, atol=1e-10)
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given)


def test_gradients_of_the_parts_are_read_off_the_gradient_of_the_dense_weight() -> None:
    made = layer((8, 6), 2, trained=False, density=0.25, alpha=4.0).train()
    x = inputs(6)
    W = made.dense().weight.requires_grad_()
    F.linear(x, W).square().sum().backward()
    M = W.grad
    assert M is not None
    made.set_bias(None)
    made(x).square().sum().backward()
    B, A = made.low_rank.inner.slots
    assert torch.allclose(made.rest.values.grad, M[made.rest.dense().weight != 0])
    assert bool((A.grad == 0).all())  # of a B that is zero
    assert torch.allclose(B.grad, 2.0 * M @ A.T)
    assert bool((B.grad != 0).any())


def test_no_dense_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []
    made = layer((50, 40), 3, density=0.1).train()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(inputs(40).requires_grad_())
    assert sorted(kept) == sorted([(3, 4, 40), (50, 3), (3, 40), (200,)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_merged_layer_is_the_trained_one(dtype: torch.dtype, tolerance: float) -> None:
    made = layer((12, 10), 3, density=0.2, dtype=dtype).train()
    x = inputs(10, dtype)
    merged = fold(made)
    assert isinstance(merged, Dense)
    y, expected = made(x), merged(x)
    assert float((y - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())
    assert torch.allclose(made.eval()(x), y, atol=tolerance * float(expected.detach().abs().max()))


def test_the_product_has_its_rank_and_the_sum_is_of_full_rank() -> None:
    made = layer((64, 64), 4, density=0.1)
    assert int(torch.linalg.matrix_rank(made.slots[0].dense().weight)) == 4
    assert int(torch.linalg.matrix_rank(made.dense().weight)) == 64


def test_supports_are_drawn_without_replacement_and_by_their_seed() -> None:
    found, again, other = started((33, 17), 2), started((33, 17), 2), started((33, 17), 2, seed=1)
    assert found.support is not None
    assert int(found.support.sum()) == int(0.03 * 33 * 17)
    assert torch.equal(found.support, again.support)
    assert torch.equal(found.A, again.A)
    assert not torch.equal(found.support, other.support)


def test_a_fitted_start_with_alpha_stands_for_the_same_weight() -> None:
    split = next(rule for rule in SPLITTERS if rule.name == "sltrain").function
    W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    plain, scaled = (
        split(W, Moments(), 3, SltrainSplitter(alpha=alpha), torch.Generator().manual_seed(0)) for alpha in (None, 12.0)
    )
    assert scaled.scaling == 4.0
    assert torch.allclose(scaled.scaling * scaled.B @ scaled.A + scaled.rest, plain.B @ plain.A + plain.rest, atol=1e-5)


def test_the_numbers_of_the_paper_come_out_of_its_configs() -> None:
    """The table of the card: millions of numbers by hidden and intermediate size, layers, rank and density."""
    table = {
        (512, 1376, 8, 128, 0.03): (43.53, 0.76), (768, 2048, 12, 256, 0.03): (96.55, 2.55),
        (1024, 2736, 24, 256, 0.03): (194.29, 9.07), (2048, 5461, 24, 512, 0.03): (645.55, 36.24),
        (4096, 11008, 32, 1024, 0.05): (3144.74, 323.80),
    }  # fmt: skip
    for (hidden, inner, layers, rank, density), (total, on_supports) in table.items():
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        cost, count = 2 * 32000 * hidden + (2 * layers + 1) * hidden, 0
        for m, n in shapes:
            nnz = int(density * m * n)
            sparse = {"map": "sparse", "shape": [m, n], "count": nnz, "bias": False}
            chain = {"map": "chain", "names": ["B", "A"], "parts": [[m, rank], [rank, n]], "bias": False}
            about = {"names": ["low_rank", "rest"], "parts": [chain, sparse], "bias": False}
            with torch.device("meta"):
                cost += layers * restore({"map": "sparse_low_rank", **about}).cost().parameters
            count += layers * nnz
        assert (round(cost / 1e6, 2), round(count / 1e6, 2)) == (total, on_supports)


class Two(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


def batches() -> list[dict[str, Tensor]]:
    """Return what `test_sltrain:batches` names as data."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return [{"x": x, "labels": x @ torch.randn(16, 20, generator=torch.Generator().manual_seed(1))}]


@cache
def captured() -> Program:
    """Return two linears, captured once."""
    torch.manual_seed(0)
    return lrc.capture(Two(), {"x": torch.randn(2, 16)})


def trained(tmp_path: Path, **options: Any) -> lrc.api.Compiled:
    train = {
        "type": "train", "objective": "regression", "optimizer": {"type": "sgd", "lr": 0.05}, "steps": 6, "batch_size": 32,
        "recipe": "sltrain", "clip": None, **options,
    }  # fmt: skip
    return lrc.compile(captured(), {"version": 1, "passes": [SPLIT, train]}, calibration=batches(), cache=tmp_path)


def test_updates_in_the_backward_pass_are_the_same_bits_and_supports_stay(tmp_path: Path) -> None:
    plain, per_layer = trained(tmp_path / "a"), trained(tmp_path / "b", per_layer=True)
    one, other = plain.program.tensors(), per_layer.program.tensors()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    made = plain.program.maps["a"]
    assert isinstance(made, SparseLowRank)
    start = lrc.compile(captured(), {"version": 1, "passes": [SPLIT]}).program.maps["a"]
    assert torch.equal(made.rest.support, start.rest.support)
    assert made.rest.count == int(0.03 * 16 * 24)
    assert not torch.equal(made.rest.values, start.rest.values)
    assert not torch.equal(made.low_rank.inner.B, start.low_rank.inner.B)
    assert any("2 weights of 864 numbers are trained as" in note for note in plain.plan.notes), plain.plan.notes
    losses = [row["loss"] for row in plain.training[0]["history"]]
    assert losses[-1] < losses[0]


def test_states_of_8_bits_go_with_it(tmp_path: Path) -> None:
    made = trained(tmp_path, optimizer={"type": "adamw8bit", "lr": 0.05}, per_layer=True, steps=30)
    losses = [row["loss"] for row in made.training[0]["history"]]
    assert losses[-1] < 0.7 * losses[0]


def test_the_recipe_refuses_what_it_cannot_train() -> None:
    program = captured()

    def context(parameters: dict[str, Tensor]) -> Context:
        return Context(program, list(program.sites), parameters, (), torch.optim.SGD(parameters.values(), lr=0.1), 10, 1)

    with pytest.raises(UsageError, match="expected low-rank plus sparse weights, got none"):
        RECIPES.get("sltrain")(context(dict(program.graph_module.named_parameters())), SltrainRecipe())
    program = lrc.compile(program, {"version": 1, "passes": [{**SPLIT, "targets": ["a"]}]}).program
    parameters = {n: p for n, p in program.graph_module.named_parameters() if not n.endswith("values")}
    with pytest.raises(UsageError, match="a: a part of Sum"):
        RECIPES.get("sltrain")(context(parameters), SltrainRecipe())


def test_a_stored_layer_is_restored_as_one() -> None:
    made = layer((12, 10), 3, density=0.2)
    twin = restore(made.structure()).double()
    twin.load_state_dict(made.state_dict())
    x = inputs(10)
    assert isinstance(twin, SparseLowRank)
    assert torch.equal(twin.train()(x), made.train()(x))
    assert repr(made).startswith("Sum(Scale(")
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    single = made.float()
    with half:
        y = single(x.float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert single.rest.values.grad.dtype == torch.float32
