"""The pass over Inductor's graphs: it moves a bias only where a kernel follows that adds it for nothing."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lrc.lower.inductor import SETTINGS, CompiledRunner, compiler
from lrc.lower.unfuse import UnfuseBias, aten


def traced(after: object) -> fx.GraphModule:
    def run(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = after(torch.ops.aten.addmm.default(bias, x, weight))  # type: ignore[operator]
        return made

    return make_fx(run, tracing_mode="fake")(torch.randn(5), torch.randn(4, 3), torch.randn(3, 5))


@pytest.mark.parametrize(
    ("after", "moved"),
    [
        (lambda y: y.relu(), True),
        (lambda y: y.view(2, 2, 5).mul(2), True),
        (lambda y: y.view(2, 2, 5).relu() + torch.var_mean(y.view(2, 2, 5), -1, keepdim=True)[1], True),
        (lambda y: y, False),  # an output is written as it is
        (lambda y: y.view(2, 2, 5).transpose(0, 1), False),
        (lambda y: y @ y.T, False),  # read by BLAS
    ],
)
def test_the_bias_moves_where_only_fused_work_reads_the_product(after: object, moved: bool) -> None:
    module = traced(after)
    inputs = [torch.randn(5), torch.randn(4, 3), torch.randn(3, 5)]
    expected = module(*inputs)
    UnfuseBias()(module.graph)
    module.graph.lint()
    module.recompile()
    left = len(module.graph.find_nodes(op="call_function", target=aten.addmm.default))
    assert left == (0 if moved else 1)
    assert torch.allclose(module(*inputs), expected, rtol=1e-6, atol=1e-6)


def test_scaled_products_and_full_matrices_are_left_alone() -> None:
    def run(full: Tensor, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(full, x, weight).relu() + torch.addmm(bias, x, weight, alpha=2).relu()

    module = make_fx(run, tracing_mode="fake")(torch.randn(4, 5), torch.randn(5), torch.randn(4, 3), torch.randn(3, 5))
    UnfuseBias()(module.graph)
    assert len(module.graph.find_nodes(op="call_function", target=aten.addmm.default)) == 2


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_module_computes_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert torch.allclose(
            CompiledRunner(module, SETTINGS["default"], True)(input=x)["output"], module(x), rtol=1e-5, atol=1e-6
        )
