"""How far two correct runs of one program may differ: derived from dtype, depth and the outputs' own spread.

Two runs of the same function (eager, Inductor, ONNX Runtime) differ in the order of their sums, in which intermediate
results they round to the storage dtype, and in their approximations of exp, erf and the like. Model one run as a chain of
`depth` weights. At each of them it adds independent relative errors of

* `sqrt(STORED) * u_storage`: about STORED = 4 intermediate results are stored for each weight (product, bias or residual,
  norm, activation), each rounded once with unit round-off u;
* `sqrt(fan_in) * u_accumulate`: a random walk over the `fan_in` additions of one product, which every kernel in use keeps
  in float32 or better (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2; Higham & Mary 2019,
  doi:10.1137/18M1226312: the probabilistic bound grows with sqrt(n), not n).

Independent errors add in squares over the depth and over the two runs, and normalisation keeps the signal at the spread
(standard deviation) of the output:

    typical = spread * sqrt(2 * depth) * (sqrt(STORED) * u_storage + sqrt(fan_in) * u_accumulate)
    largest = PEAK * typical      PEAK = 6: the largest of 1e8 normal errors stays below sqrt(2 ln 1e8) = 6.1 of them

The mean error must stay within `typical` and the largest within `largest`; the mean is the sharper of the two: it sees a
small fault in every output. A floor of four units in the last place of the largest output covers outputs of almost no spread.
An artifact that rounds the inputs of products to a few bits says which relative error `rounding` that adds to each; that run is
the only one of the two that has it, so it enters as rounding / sqrt(2) beside the two other terms, added in squares.

In numbers, for an encoder of 37 weights up to 1536 wide: 1.3e-4 of the spread at most in float32, 0.05 in float16, 0.4 in
bfloat16 (0.07 on average). Dropping one bias or changing a norm's epsilon shows well above these in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.maps import Quantized, Sparse
from lrc.program import Program

STORED = 4
PEAK = 6.0
FLOOR = 4


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute error of any output value, and the largest mean absolute error."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Numerics:
    """What the errors of a program depend on.

    dtype: the coarsest floating type among its weights; depth: number of weights with two or more dimensions; fan_in: the
    longest sum in any of them; rounding: the relative error of a product whose inputs are rounded to a few bits.
    """

    dtype: torch.dtype
    depth: int
    fan_in: int
    rounding: float = 0.0

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Numerics":
        """Read them off a state dict. A program without floating weights counts as float32 with one weight."""
        floating = [t for t in state.values() if t.is_floating_point()]
        weights = [t for t in floating if t.ndim >= 2]
        dtype = max((t.dtype for t in floating), key=lambda d: torch.finfo(d).eps, default=torch.float32)
        fan_in = max((math.prod(t.shape[1:]) for t in weights), default=1)
        return cls(dtype, max(len(weights), 1), max(fan_in, 1))

    @classmethod
    def of_program(cls, program: Program) -> "Numerics":
        """Read them off a program: packed weights count as the matrices that they stand for."""
        found = cls.of(program.tensors())
        packed = [made for made in program.graph_module.modules() if isinstance(made, Quantized | Sparse)]
        depth, fan_in = len(packed), max((made.in_features for made in packed), default=1)
        return replace(found, depth=found.depth + depth, fan_in=max(found.fan_in, fan_in)) if packed else found

    def tolerance(self, expected: Tensor) -> Tolerance:
        """Return the tolerance for one output, in its unit. Non-finite values (a mask's -inf) do not count."""
        values = expected[torch.isfinite(expected)].double()
        if not values.numel():
            return Tolerance(0.0, 0.0)
        storage = max(torch.finfo(self.dtype).eps, torch.finfo(expected.dtype).eps) / 2
        accumulate = torch.finfo(torch.float32).eps / 2
        step = math.hypot(math.sqrt(STORED) * storage + math.sqrt(self.fan_in) * accumulate, self.rounding / math.sqrt(2))
        typical = float(values.std(correction=0)) * math.sqrt(2 * self.depth) * step
        floor = FLOOR * storage * float(values.abs().max())
        return Tolerance(max(PEAK * typical, floor), max(typical, floor))
