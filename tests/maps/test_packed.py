"""Maps that store their weight packed: quantised ones and sparse ones."""

import json
import warnings
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import randn
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from lrc.formats import FORMATS, support_of
from lrc.maps import Chain, Codebook, LinearMap, Quantized, Sparse, Sum, fold, restore, simplify
from lrc.maps.recompute import Packed, packed_linear
from lrc.solvers.splits.support import strongest

FORMAT_NAMES = st.sampled_from(list(FORMATS))
SHAPES = st.sampled_from([(1, 1), (1, 70), (70, 1), (5, 33), (64, 48)])


def sparse(m: int, n: int, density: float, seed: int = 0, bias: bool = False) -> Sparse:
    support = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < density
    return Sparse.of(randn(m, n, seed=seed).float(), support, randn(m, seed=seed + 1).float() if bias else None)


def bytes_of(made: LinearMap) -> int:
    return sum(t.numel() * t.element_size() for t in [*made.parameters(), *made.buffers()])


def check(made: LinearMap) -> None:
    """Apply, cost and restore a map."""
    x = randn(3, made.in_features, seed=9).float()
    weight, bias = made.dense()
    torch.testing.assert_close(made(x), nn.functional.linear(x, weight, bias))
    assert made.cost().bytes == bytes_of(made)
    restored = restore(json.loads(json.dumps(made.structure())))
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored(x), made(x))
    assert restored.cost(3) == made.cost(3)
    assert repr(restored) == repr(made)


@settings(max_examples=25, deadline=None)
@given(name=FORMAT_NAMES, shape=SHAPES, bias=st.booleans())
def test_a_quantised_map_is_what_it_says(name: str, shape: tuple[int, int], bias: bool) -> None:
    W = randn(*shape, seed=1).float()
    made = Quantized.of(W, FORMATS[name], randn(shape[0], seed=2).float() if bias else None)
    check(made)
    assert torch.equal(made.dense().weight, FORMATS[name].rounded(W))
    assert made.cost().parameters == W.numel() + (shape[0] if bias else 0)
    floating = sum(t.numel() for t in [*made.parameters(), *made.buffers()] if t.is_floating_point())
    assert floating + made.packed_numbers == made.cost().parameters


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, density=st.sampled_from([0.0, 0.01, 0.3, 1.0]), seed=st.integers(0, 99), bias=st.booleans())
def test_a_sparse_map_is_what_it_says(shape: tuple[int, int], density: float, seed: int, bias: bool) -> None:
    check(sparse(*shape, density, seed, bias))


def test_few_numbers_are_stored_by_position_and_many_by_a_mask() -> None:
    few, many = sparse(64, 64, 0.01), sparse(64, 64, 0.5)
    assert few.support.dtype == torch.int32
    assert many.support.dtype == torch.uint8
    assert many.cost().bytes == 4 * many.count + 64 * 64 // 8


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_gradients_reach_the_numbers_of_the_support_alone(density: float) -> None:
    made = sparse(16, 24, density)
    x = randn(5, 24, seed=3).float().requires_grad_()
    loss = made(x).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    W = made.dense().weight.requires_grad_()
    nn.functional.linear(x.detach(), W).square().sum().backward()  # type: ignore[no-untyped-call]
    assert W.grad is not None
    assert made.values.grad is not None
    torch.testing.assert_close(made.values.grad, W.grad[made.dense().weight != 0])
    assert x.grad is not None


def test_gradients_pass_through_a_quantised_map_and_train_nothing_in_it() -> None:
    made = Quantized.of(randn(16, 24, seed=1).float(), FORMATS["nf4"])
    x = randn(5, 24, seed=3).float().requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dense().weight.sum(0).expand(5, 24))
    assert list(made.parameters()) == []


def test_a_cast_changes_what_is_computed_and_not_what_is_stored() -> None:
    made = Quantized.of(randn(16, 128, seed=1).float(), FORMATS["nf4"], torch.zeros(16))
    stored = {name: tensor.clone() for name, tensor in made.encoded.items()}
    before = made.dense().weight
    made.to(torch.bfloat16)
    assert made(randn(2, 128, seed=0).bfloat16()).dtype == torch.bfloat16
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert all(torch.equal(made.encoded[name], tensor) for name, tensor in stored.items())
    assert torch.equal(made.dense().weight, before.bfloat16())


PATTERNS = ["all", "2:4", "1:4", "4:8", "3:16", "2x3", "16x16"]


def supported(m: int, n: int, pattern: str, density: float, seed: int) -> Tensor:
    return strongest(torch.rand(m, n, generator=torch.Generator().manual_seed(seed)), pattern, density)


@settings(max_examples=40, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), shape=SHAPES, density=st.sampled_from([0.0, 0.02, 0.5, 1.0]), bias=st.booleans())
def test_a_map_of_any_pattern_is_what_it_says(pattern: str, shape: tuple[int, int], density: float, bias: bool) -> None:
    W, kept = randn(*shape, seed=1).float(), supported(*shape, pattern, density, seed=2)
    made = Sparse.of(W, kept, randn(shape[0], seed=3).float() if bias else None, pattern)
    assert torch.equal(made.dense().weight, W * kept)
    check(made)


def test_the_bytes_of_every_pattern() -> None:
    def stored(pattern: str, density: float = 0.25) -> tuple[int, int]:
        made = Sparse.of(randn(64, 64, seed=1).float(), supported(64, 64, pattern, density, seed=2), pattern=pattern)
        return made.count, made.cost().bytes - 4 * made.count

    assert stored("2:4") == (2048, 512)  # two bits a number
    assert stored("1:4") == (1024, 256)
    assert stored("4:8") == (2048, 512)  # a bit an entry is less than three a number
    assert stored("2:16") == (512, 256)  # four bits a number
    assert stored("16x16") == (1024, 2)  # a bit for each of 16 blocks
    assert stored("2x2", 0.01) == (40, 40)  # ten positions


def test_a_support_of_another_pattern_is_refused() -> None:
    kept = torch.zeros(4, 8, dtype=torch.bool)
    kept[1, 4:7] = True
    for pattern, message in (("2:4", "a group of 4 keeps 3"), ("2x2", "not made of whole blocks")):
        with pytest.raises(ValueError, match=message):
            Sparse.of(torch.ones(4, 8), kept, pattern=pattern)
    for word in ("4:2", "0x3", "4:4", "rows", "2:512"):
        with pytest.raises(ValueError, match="expected"):
            support_of(word)


def test_a_group_with_too_few_numbers_gets_zeros_beside_them() -> None:
    kept = torch.zeros(1, 8, dtype=torch.bool)
    kept[0, 6] = True
    made = Sparse.of(torch.ones(1, 8), kept, pattern="2:4")
    assert made.values.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert made.dense().weight.tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("pattern", ["all", "2:4", "4:8", "2x3", "few"])
def test_the_gradients_of_a_sparse_map_are_right(pattern: str) -> None:
    few = pattern == "few"
    kept = supported(4, 18, "all" if few else pattern, 0.03 if few else 0.5, seed=2)
    made = Sparse.of(randn(4, 18, seed=1), kept, randn(4, seed=4), "all" if few else pattern)
    assert made.kind.by_position(made.support) == few
    x = randn(1, 2, 18, seed=3).requires_grad_()

    def apply(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        product = made._csr_product if few else None
        return packed_linear(x, bias, Packed((made.support,), made.weight_of, made.gathered_of, product), values)

    given = (x, made.values.detach().clone().requires_grad_(), randn(4, seed=5).requires_grad_())
    assert torch.autograd.gradcheck(apply, given)
    assert torch.autograd.gradgradcheck(apply, given, fast_mode=True)


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_gradients_of_a_quantised_map_are_right(name: str) -> None:
    made = Quantized.of(randn(4, 18, seed=1), FORMATS[name], randn(4, seed=4)).double()
    x = randn(1, 2, 18, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))
    assert torch.autograd.gradgradcheck(made, (x,), fast_mode=True)
    made(x).sum().backward()
    assert made.bias is not None
    torch.testing.assert_close(made.bias.grad, torch.full((4,), 2.0, dtype=torch.float64))


def kept_for_backward(made: LinearMap, x: Tensor) -> int:
    """The floating numbers that autograd keeps for one call, those of x and of the parameters left out."""
    own = {t.data_ptr() for t in [x, *made.parameters(), *made.buffers()]}
    kept: list[int] = []

    def seen(tensor: Tensor) -> Tensor:
        kept.append(0 if tensor.data_ptr() in own else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        made(x).sum().backward()
    return sum(kept)


@pytest.mark.parametrize("pattern", ["all", "2:4", "16x16", "nf4", "int8"])
def test_no_dense_weight_is_kept_for_the_backward(pattern: str) -> None:
    W = randn(64, 96, seed=1).float()
    if pattern in FORMATS:
        rest: LinearMap = Quantized.of(W, FORMATS[pattern])
    else:
        rest = Sparse.of(W, supported(64, 96, pattern, 0.3, seed=2), pattern=pattern)
    made = Sum(Chain(randn(64, 4, seed=3).float(), randn(4, 96, seed=4).float()), rest)
    x = randn(5, 96, seed=5).float().requires_grad_()
    assert kept_for_backward(made, x) == 5 * 4  # what stands between the factors
    if isinstance(rest, Sparse):
        rest.values.requires_grad_(False)
        assert kept_for_backward(made, x) == 5 * 4


def test_a_compiler_keeps_packed_numbers_for_the_backward() -> None:
    kept: list[list[tuple[int, ...]]] = []

    def forward_graph(graph: fx.GraphModule, _: Any) -> Any:
        (outputs,) = graph.graph.find_nodes(op="output")
        kept.append([tuple(node.meta["val"].shape) for node in outputs.args[0]])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_graph, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    W, codes = randn(64, 96, seed=1).float(), torch.arange(64 * 12) % 7
    made = nn.Sequential(
        Sum(
            Chain(randn(64, 4, seed=3).float(), randn(4, 96, seed=4).float()), Quantized.of(W, FORMATS["nf4"], torch.zeros(64))
        ),
        Sparse.of(W.T.contiguous(), supported(96, 64, "2:4", 0.5, seed=2), pattern="2:4"),
        Codebook.of(codes, randn(7, 8, seed=5).float(), 64),
        Codebook.of(codes, randn(7, 8, seed=6).half(), 96, torch.float32),
    )
    x = randn(5, 96, seed=5).float().requires_grad_()
    given = [x, *made.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        torch._dynamo.reset()
        found = torch.compile(made, backend=backend, fullgraph=True)(x)
    assert not [shape for shape in kept[0] if sorted(shape) == [64, 96]]
    own, plain = torch.autograd.grad(found.square().sum(), given), torch.autograd.grad(made(x).square().sum(), given)
    for one, other in zip(own, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_packed_maps_work_under_autocast_and_vmap() -> None:
    W = randn(8, 40, seed=1).float()
    for made in (
        Quantized.of(W, FORMATS["nf4"], torch.ones(8)),
        Sparse.of(W, supported(8, 40, "2:4", 0.5, 2), torch.ones(8), "2:4"),
        Sparse.of(W, supported(8, 40, "all", 0.02, 2), torch.ones(8)),
    ):
        x = randn(3, 40, seed=3).float().requires_grad_()
        plain = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
        each = torch.func.vmap(torch.func.grad(lambda row, made=made: made(row[None]).square().sum()))(x)
        torch.testing.assert_close(each, plain[0])
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        assert y.dtype == torch.bfloat16
        half = torch.autograd.grad(y.float().square().sum(), [x, *made.parameters()])
        for one, other in zip(half, plain, strict=True):
            assert one.dtype == torch.float32
            assert float((one - other).norm() / other.norm()) < 0.03


@pytest.mark.parametrize("make", [lambda W: Quantized.of(W, FORMATS["int8"]), lambda W: Sparse.of(W, W.abs() > 0.5)])
def test_merge_leaves_packed_maps_alone_unless_asked(make: object) -> None:
    def made() -> Tensor | LinearMap:
        return make(randn(16, 24, seed=1).float())  # type: ignore[operator,no-any-return]

    both = Sum(Chain(randn(16, 2, seed=2).float(), randn(2, 24, seed=3).float()), made(), bias=torch.ones(16))
    assert simplify(both).map is both
    folded = fold(both)
    x = randn(3, 24, seed=4).float()
    torch.testing.assert_close(folded(x), both(x), atol=1e-5, rtol=1e-5)
