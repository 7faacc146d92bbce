"""Every map applies what it says it stands for, costs what it stores, and is named and stored in one way."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import F64, maps, order_of, pivoted, randn, rounding, seeds, shapes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrc.maps import Chain, Cost, Dense, Diagonal, LinearMap, Permutation, Pivoted, Scale, Sum, frozen
from lrc.maps.pivoted import Side


def numbers(made: LinearMap) -> int:
    return sum(p.numel() for p in made.parameters())


@settings(max_examples=30, deadline=None)
@given(shape=shapes, leading=st.sampled_from([(), (5,), (2, 3), (0,)]), seed=seeds, data=st.data())
def test_forward_is_the_affine_function_that_dense_returns(
    shape: tuple[int, int], leading: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    m, n = shape
    made = data.draw(maps(m, n))
    x = randn(*leading, n, seed=seed)
    weight, bias = made.dense()
    expected = x @ weight.T + (0 if bias is None else bias)
    assert (made.out_features, made.in_features) == (m, n)
    assert weight.shape == (m, n)
    assert made(x).shape == (*leading, m)
    assert ((made(x) - expected).abs() <= 2 * rounding(made, x)).all()


@settings(max_examples=30, deadline=None)
@given(shape=shapes, data=st.data())
def test_parameters_are_the_stored_numbers_and_bytes_count_indexes_too(shape: tuple[int, int], data: st.DataObject) -> None:
    made = data.draw(maps(*shape))
    cost = made.cost(3)
    assert cost.parameters == numbers(made)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in [*made.parameters(), *made.buffers()])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), [(6, 4, 2), (4, 6, 2), (1, 5, 1), (5, 1, 1)])
def test_costs_follow_their_formulas(m: int, n: int, rank: int, bias: bool) -> None:
    tokens, b = 7, torch.zeros(m) if bias else None
    added = Cost(m, 4 * m, tokens * m) if bias else Cost()
    W, B, A = torch.zeros(m, n), torch.zeros(m, rank), torch.zeros(rank, n)
    size = rank * (m + n)
    assert Dense(W, b).cost(tokens) == Cost(m * n, 4 * m * n, 2 * tokens * m * n) + added
    assert Chain(B, A, bias=b).cost(tokens) == Cost(size, 4 * size, 2 * tokens * size) + added
    both = m * n + size
    assert Sum(W, Chain(B, A), bias=b).cost(tokens) == Cost(both, 4 * both, 2 * tokens * both) + added
    assert Scale(W, 2.0, b).cost(tokens) == Cost(m * n, 4 * m * n, 2 * tokens * m * n) + added


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), [(6, 4, 2), (4, 6, 3), (1, 5, 1), (5, 1, 1), (4, 4, 4)])
def test_a_pivoted_map_costs_r_m_plus_n_minus_r_and_its_index_only_bytes(
    m: int, n: int, rank: int, index: bool, side: str
) -> None:
    tokens, size = 7, rank * (m + n - rank)
    indexed = (m if side == "out" else n) if index else 0
    added = tokens * rank if side == "in" else 0
    made = pivoted(m, n, rank, 0, side, index=index, bias=False)
    assert made.cost(tokens) == Cost(size, 8 * size + 4 * indexed, 2 * tokens * size + added)
    assert made.rank == rank
    with_bias = pivoted(m, n, rank, 0, side, index=index, bias=True)
    assert with_bias.cost(tokens) == made.cost(tokens) + Cost(m, 8 * m, tokens * m)


def test_a_diagonal_costs_its_numbers_and_a_permutation_only_bytes() -> None:
    assert Diagonal(torch.zeros(5), torch.zeros(5)).cost(3) == Cost(10, 40, 30)
    assert Permutation(torch.arange(5)).cost(3) == Cost(0, 20, 0)


def test_half_precision_costs_half_the_bytes() -> None:
    made = Chain(torch.zeros(6, 2, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16))
    assert made.cost().bytes == 2 * made.cost().parameters == 2 * 20


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Dense(torch.zeros(5, 3)), "Dense[5,3]"),
        (Dense(torch.zeros(5, 3), torch.zeros(5)), "Dense[5,3]"),
        (Diagonal(torch.zeros(5)), "Diagonal[5]"),
        (Permutation(torch.arange(5)), "Permutation[5]"),
        (pivoted(5, 3, 2, 0), "Pivoted[5,2,3]"),
        (pivoted(5, 3, 2, 0, "in"), "Pivoted[5,2,3]"),
        (Chain(torch.zeros(5, 2), torch.zeros(2, 3)), "Chain[5,2,3]"),
        (Chain(torch.zeros(5, 2), torch.zeros(2, 2), torch.zeros(2, 3)), "Chain[5,2,2,3]"),
        (Chain(torch.zeros(5, 2), Diagonal(torch.zeros(2)), torch.zeros(2, 3)), "Chain(Dense[5,2], Diagonal[2], Dense[2,3])"),
        (Sum(frozen(Dense(torch.zeros(5, 3))), Chain(torch.zeros(5, 2), torch.zeros(2, 3))), "Sum(Dense[5,3]*, Chain[5,2,3])"),
        (frozen(Chain(torch.zeros(5, 2), torch.zeros(2, 3))), "Chain[5,2,3]*"),
        (Scale(Chain(torch.zeros(5, 2), torch.zeros(2, 3)), 0.5), "Scale(0.5, Chain[5,2,3])"),
        (Scale(torch.zeros(5, 3), 2.0), "Scale(2, Dense[5,3])"),
    ],
)
def test_a_map_reads_as_one_line(made: LinearMap, text: str) -> None:
    assert repr(made) == text


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (Dense(torch.zeros(5, 3), torch.zeros(5)), {"weight", "bias"}),
        (Chain(torch.zeros(5, 2), torch.zeros(2, 3), bias=torch.zeros(5)), {"A", "B", "bias"}),
        (Chain(Dense(torch.zeros(5, 2)), Dense(torch.zeros(2, 3))), {"A", "B"}),
        (Chain(torch.zeros(5, 2), torch.zeros(2, 2), torch.zeros(2, 3)), {"A", "B", "R"}),
        (Chain(torch.zeros(5, 2), torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)), {"A", "B", "R1", "R2"}),
        (Chain(torch.zeros(5, 2), Dense(torch.zeros(2, 3), torch.zeros(2))), {"B", "A.weight", "A.bias"}),
        (pivoted(5, 3, 2, 0), {"P", "Z", "index", "bias"}),
        (pivoted(5, 3, 2, 0, index=False, bias=False), {"P", "Z"}),
        (Sum(torch.zeros(5, 3), Chain(torch.zeros(5, 2), torch.zeros(2, 3))), {"term0", "term1.A", "term1.B"}),
        (Sum(torch.zeros(5, 3), torch.zeros(5, 3), names=["base", "delta"]), {"base", "delta"}),
        (Scale(torch.zeros(5, 3)), {"inner"}),
    ],
)
def test_tensors_are_stored_under_their_names(made: LinearMap, names: set[str]) -> None:
    assert set(made.state_dict()) == names


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_a_twin_with_another_bias_shares_every_other_tensor(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    m, n = shape
    made = data.draw(maps(m, n))
    x, bias = randn(2, n, seed=seed), nn.Parameter(randn(m, seed=seed + 1))
    before = made(x)
    own = torch.zeros(m, dtype=F64) if made.bias is None else made.bias
    twin = made.with_bias(bias)
    assert twin.bias is bias
    mine, theirs = dict(made.named_parameters()), dict(twin.named_parameters())
    assert all(theirs[name] is mine[name] for name in mine if name != "bias")
    assert ((twin(x) - (before - own + bias)).abs() <= 2 * (rounding(made, x) + rounding(twin, x))).all()
    assert torch.equal(made(x), before)
    assert made.with_bias(None).bias is None


@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_the_bias_can_be_set_and_taken_away(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    made, bias = data.draw(maps(*shape)), randn(shape[0], seed=seed)
    made.set_bias(None)
    x = randn(3, shape[1], seed=seed + 1)
    bare = made(x)
    made.set_bias(bias)
    assert isinstance(made.bias, nn.Parameter)
    assert ((made(x) - (bare + bias)).abs() <= 2 * rounding(made, x)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_multiplied_out_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    B, A = randn(6, 3, seed=0).to(dtype), randn(3, 4, seed=1).to(dtype)
    made = Chain(B, A, bias=torch.ones(6, dtype=dtype))
    weight, bias = made.dense()
    assert torch.equal(weight, (B.double() @ A.double()).to(dtype))
    assert bias is not None
    assert bias.dtype == dtype
    assert made.exact().weight.dtype == torch.float64


def test_the_dense_form_of_a_dense_map_is_its_own_weight() -> None:
    made = Dense(torch.zeros(5, 3), torch.zeros(5))
    weight, bias = made.dense()
    assert weight.data_ptr() == made.weight.data_ptr()
    assert bias is not None
    assert bias.data_ptr() == made.bias.data_ptr()


def test_gradients_reach_both_factors_and_no_frozen_one() -> None:
    made = Sum(frozen(Dense(randn(5, 3, seed=0))), Chain(randn(5, 2, seed=1), randn(2, 3, seed=2)))
    made(randn(4, 3, seed=3)).sum().backward()
    base, pair = made.slots
    assert isinstance(pair, Chain)
    assert base.grad is None
    assert torch.allclose(pair.B.grad, torch.ones(5, 1, dtype=F64) @ (randn(4, 3, seed=3) @ pair.A.detach().T).sum(0)[None])
    assert pair.A.grad.abs().min() > 0


def test_a_pivoted_map_puts_rows_and_columns_where_its_index_says() -> None:
    P, Z = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [-1.0]])
    rows = [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [-1.0, -2.0, -3.0]]
    index = torch.tensor([2, 0, 1])
    assert Pivoted(P, Z, None).dense().weight.tolist() == rows
    assert Pivoted(P, Z, index).dense().weight.tolist() == [rows[2], rows[0], rows[1]]
    x = torch.tensor([1.0, 2.0, 3.0])
    columns = Pivoted(P.T.contiguous(), Z, index, "in")
    assert columns(x).tolist() == (x[2] + 10 * x[0] - x[1]).mul(P[0]).tolist()


def test_a_permutation_takes_inputs_in_its_order() -> None:
    order = order_of(5, 3)
    x = torch.arange(10.0).reshape(2, 5)
    made = Permutation(order)
    assert torch.equal(made(x), x[:, order])
    assert made.dtype == torch.float32
    assert not made.is_identity()
    assert Permutation(torch.arange(5)).is_identity()


def test_a_chain_of_permutations_has_a_dense_form() -> None:
    first, second = order_of(5, 0), order_of(5, 1)
    made = Chain(Permutation(first, F64), Permutation(second, F64))
    assert torch.equal(made.dense().weight, torch.eye(5, dtype=F64)[first] @ torch.eye(5, dtype=F64)[second])


def test_parts_that_do_not_fit_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"a chain of shapes \[\(5, 2\), \(3, 4\)\] does not fit"):
        Chain(torch.zeros(5, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"terms of a sum have the shapes \[\(3, 5\), \(5, 3\)\]"):
        Sum(torch.zeros(5, 3), torch.zeros(3, 5))


def test_a_map_without_a_dense_form_says_so() -> None:
    class Bent(LinearMap):
        word = "bent"

    made = Bent()
    for call in (made.exact, made.dense, made.cost, made.structure, lambda: made(torch.zeros(1)), lambda: Bent.restored({})):
        with pytest.raises(TypeError, match="Bent"):
            call()


def test_an_input_of_the_wrong_size_is_refused_by_every_map() -> None:
    x: Tensor = torch.zeros(2, 4, dtype=F64)
    for made in (Dense(randn(5, 3, seed=0)), Chain(randn(5, 2, seed=0), randn(2, 3, seed=0)), pivoted(5, 3, 2, 0)):
        with pytest.raises(RuntimeError):
            made(x)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0), (2, 1, 3)])
def test_a_gather_runs_along_two_dimensions_whatever_the_input_has(side: Side, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    m, r, n = 7, 3, 5
    rows, other = (m, n) if side == "out" else (n, m)
    P = torch.randn((r, other) if side == "out" else (other, r), generator=generator)
    made = Pivoted(P, torch.randn(rows - r, r, generator=generator), torch.randperm(rows, generator=generator), side)
    x = torch.randn(*leading, n, generator=generator)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "index_select" in str(func):
                seen.append(args[0].ndim)
            return func(*args, **(kwargs or {}))

    seen: list[int] = []
    with Watch():
        y = made(x)
    assert y.shape == (*leading, m)
    assert seen == [min(2, len(leading) + 1)]
    torch.testing.assert_close(y, torch.nn.functional.linear(x, made.dense().weight))
