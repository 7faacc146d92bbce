"""FLOPs of a program at a shape: its linears, convolutions and attention, which is nearly all there is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import LinearMap
from lrc.maps.recurrence import Recurrence, recur
from lrc.program import Program
from lrc.program.experts import GROUPED
from lrc.program.recurrences import KINDS

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.convolution.default,
}  # fmt: skip


def count_flops(program: Program, inputs: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of all linears, convolutions, products and attention for `inputs` (a multiply-add counts 2)."""
    counter = _Counter(program.graph_module)
    with torch.no_grad():
        counter.run(*program.inputs.fill(inputs).values())
    return counter.flops


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.flops = 0

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        made, value = self.fetch_attr(target), super().call_module(target, args, kwargs)
        if isinstance(made, LinearMap):
            self.flops += made.cost(value.numel() // made.out_features).flops
        elif isinstance(made, Recurrence):
            self.flops += made.map.cost(value[0].shape[:-1].numel()).flops
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().call_function(target, args, kwargs)
        if target in KINDS:
            weights = sum(param.numel() for param in args[2] if param.ndim == 2)
            self.flops += 2 * weights * value[0].shape[:-1].numel()
        elif target == recur:
            self.flops += 2 * args[5].numel() * value[0].shape[:-1].numel()
        elif target == aten.linear.default:
            self.flops += 2 * value.numel() * args[1].shape[1]
        elif target in CONVOLUTIONS:
            self.flops += 2 * value.numel() * args[1][0].numel()
        elif target == aten.addmm.default:
            self.flops += 2 * value.numel() * args[1].shape[-1]
        elif target in (aten.mm.default, aten.bmm.default, aten.matmul.default) or str(target) in GROUPED:
            self.flops += 2 * value.numel() * args[0].shape[-1]
        elif target == aten.scaled_dot_product_attention.default:
            query, key = args[0], args[1]
            self.flops += 4 * query.numel() * key.shape[-2]
        return value
