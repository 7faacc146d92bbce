"""The pass that writes erf as a rational function: as good as float32 asks for, everywhere."""

import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lrc.lower.erf import RationalErf, aten
from lrc.lower.inductor import SETTINGS, CompiledRunner, compiler


def rewritten(dtype: torch.dtype) -> fx.GraphModule:
    module = make_fx(torch.erf, tracing_mode="fake")(torch.zeros(4, dtype=dtype))
    RationalErf()(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def left(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=aten.erf.default))


def test_it_is_erf_to_the_rounding_of_float32() -> None:
    module = rewritten(torch.float32)
    assert left(module) == 0
    x = torch.cat([torch.linspace(-8, 8, 400_001), torch.logspace(-30, 0, 10_001), torch.tensor([0.0, -0.0])])
    error = (module(x).double() - torch.erf(x.double())).abs()
    assert error.max() < 5e-7
    assert (error <= 6e-7 * torch.erf(x.double()).abs()).all()  # relative too: zero and small values are exact to rounding


def test_it_is_odd_and_ends_at_one() -> None:
    module = rewritten(torch.float32)
    x = torch.linspace(0, 8, 10_001)
    assert torch.equal(module(-x), -module(x))
    ends = module(torch.tensor([4.0, 100.0, math.inf, -math.inf]))
    assert torch.allclose(ends, torch.tensor([1.0, 1.0, 1.0, -1.0]), rtol=0, atol=5e-7)
    assert module(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_keep_torchs_erf(dtype: torch.dtype) -> None:
    assert left(rewritten(dtype)) == 1


def test_a_gelu_in_a_graph_becomes_elementwise_work() -> None:
    def run(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))

    x = torch.linspace(-6, 6, 10_001)
    module = make_fx(run, tracing_mode="fake")(x)
    RationalErf()(module.graph)
    module.recompile()
    assert left(module) == 0
    assert torch.allclose(module(x), nn.functional.gelu(x), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_gelu_is_the_eager_one() -> None:
    x = torch.linspace(-6, 6, 1001).reshape(7, 143)
    compiled = CompiledRunner(nn.GELU(), SETTINGS["default"], True)(input=x)["output"]
    assert torch.allclose(compiled, nn.functional.gelu(x), rtol=0, atol=2e-6)
