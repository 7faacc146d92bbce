"""How far two correct runs may differ: wide enough for rounding, narrow enough for a fault."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import captured_mlp
from torch import Tensor, nn

from lrc.formats import FORMATS
from lrc.maps import Quantized
from lrc.verify.tolerance import FLOOR, PEAK, STORED, Numerics

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def deep(depth: int, width: int, seed: int = 0) -> nn.Module:
    """Linears and norms, one after the other."""
    torch.manual_seed(seed)
    parts = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
    return nn.Sequential(*parts).eval()


def numerics_of(model: nn.Module) -> Numerics:
    return Numerics.of(model.state_dict())


def within(found: Tensor, expected: Tensor, numerics: Numerics) -> bool:
    difference = (found.double() - expected.double()).abs()
    allowed = numerics.tolerance(expected)
    return float(difference.max()) <= allowed.largest and float(difference.mean()) <= allowed.mean


def test_the_numerics_are_read_off_the_weights() -> None:
    state = {
        "a": torch.zeros(20, 12), "bias": torch.zeros(20), "conv": torch.zeros(8, 3, 5, 5, dtype=torch.bfloat16),
        "index": torch.zeros(900, 900, dtype=torch.int32),
    }  # fmt: skip
    assert Numerics.of(state) == Numerics(torch.bfloat16, 2, 75)
    assert Numerics.of({}) == Numerics(torch.float32, 1, 1)


def test_the_tolerance_is_the_formula_of_its_docstring() -> None:
    """By hand: spread 2, depth 8, fan-in 64, in float32."""
    expected = torch.tensor([-2.0, 2.0, -2.0, 2.0])
    unit = 2.0**-24
    typical = 2.0 * math.sqrt(2 * 8) * (math.sqrt(STORED) * unit + math.sqrt(64) * unit)
    found = Numerics(torch.float32, 8, 64).tolerance(expected)
    assert found.mean == pytest.approx(typical, rel=1e-12)
    assert found.largest == pytest.approx(PEAK * typical, rel=1e-12)


@given(
    scale=st.floats(1e-3, 1e3), depth=st.integers(1, 200), fan_in=st.integers(1, 8192), dtype=st.sampled_from(DTYPES)
)  # fmt: skip
def test_the_tolerance_scales_with_the_outputs_and_grows_with_the_model(
    scale: float, depth: int, fan_in: int, dtype: torch.dtype
) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = Numerics(dtype, depth, fan_in).tolerance(values)
    assert Numerics(dtype, depth, fan_in).tolerance(scale * values).largest == pytest.approx(scale * here.largest, rel=1e-9)
    assert Numerics(dtype, depth + 1, fan_in).tolerance(values).largest >= here.largest
    assert Numerics(dtype, depth, 2 * fan_in).tolerance(values).largest >= here.largest
    assert here.mean <= here.largest


def test_outputs_of_no_spread_get_some_units_in_the_last_place() -> None:
    found = Numerics(torch.float32, 4, 16).tolerance(torch.full((9,), 3.0))
    assert found.largest == found.mean == FLOOR * 2.0**-24 * 3.0


def test_values_that_are_not_finite_do_not_count() -> None:
    values = torch.tensor([1.0, -1.0, torch.inf, -torch.inf])
    numerics = Numerics(torch.float32, 1, 1)
    assert numerics.tolerance(values) == numerics.tolerance(values[:2])
    nothing = numerics.tolerance(torch.full((3,), -torch.inf))
    assert (nothing.largest, nothing.mean) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 12])
def test_another_order_of_the_sums_stays_within(depth: int, dtype: torch.dtype) -> None:
    """The same model with its hidden features in another order: what a different kernel does, seen as numbers."""
    width = 96
    model = deep(depth, width).to(dtype)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    twin = deep(depth, width).to(dtype)
    with torch.no_grad():
        for part in twin:
            if isinstance(part, nn.Linear):
                part.weight.copy_(part.weight[order][:, order])
                part.bias.copy_(part.bias[order])
        expected, found = model(x), twin(x[:, order])
    assert within(found, expected[:, order], numerics_of(model))


def test_a_run_in_double_precision_stays_within() -> None:
    for depth in (1, 6, 24):
        model = deep(depth, 96)
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(x)
            found = model.double()(x.double())
        assert within(found, expected, Numerics(torch.float32, 3 * depth, 96))


@pytest.mark.parametrize("fault", ["a bias is dropped", "an epsilon is changed", "one weight is off by a tenth"])
def test_a_small_fault_in_single_precision_is_beyond(fault: str) -> None:
    model, broken = deep(6, 96), deep(6, 96)
    with torch.no_grad():
        if fault == "a bias is dropped":
            broken[6].bias.zero_()
        elif fault == "an epsilon is changed":
            for part in broken:
                if isinstance(part, nn.LayerNorm):
                    part.eps = 1e-3
        else:
            broken[9].weight[3, 5] += 0.1
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
        assert not within(broken(x), model(x), numerics_of(model))


def test_a_perceptron_in_another_dtype_is_beyond_its_own() -> None:
    model, x = tiny.mlp(), tiny.mlp_inputs(32)
    with torch.no_grad():
        expected = model(x)
        found = model.bfloat16()(x.bfloat16())
    assert not within(found, expected, Numerics(torch.float32, 3, 20))
    assert within(found, expected, Numerics(torch.bfloat16, 3, 20))


def test_inputs_rounded_to_a_few_bits_count_for_one_of_the_two_runs() -> None:
    expected = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plain, rounded = Numerics(torch.float32, 32, 64), Numerics(torch.float32, 32, 64, rounding=0.01)
    spread = float(expected.std(correction=0))
    assert rounded.tolerance(expected).mean == pytest.approx(spread * 32**0.5 * 0.01, rel=1e-3)
    assert plain.tolerance(expected).mean < 1e-4 * rounded.tolerance(expected).mean * 10


def test_packed_weights_count_as_the_matrices_that_they_stand_for() -> None:
    program = captured_mlp().clone()
    before = Numerics.of_program(program)
    fqn = next(iter(program.sites))
    program.replace(fqn, Quantized.of(program.map_of(fqn).dense().weight, FORMATS["int8"], program.map_of(fqn).dense().bias))
    assert Numerics.of_program(program).depth == before.depth
