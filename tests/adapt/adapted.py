"""A small model with every kind of site, and what tests of adapter methods do to it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lrc
from lrc.api import Compiled
from lrc.maps import LinearMap
from lrc.program import Program

MERGE = {"version": 1, "passes": [{"type": "merge"}, {"type": "merge", "targets": ["table"], "optional": True}]}


class Sites(nn.Module):
    """An embedding, a convolution, linears of every shape: tall, wide, square, of one row, of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
        self.tall = nn.Linear(8, 20)
        self.square = nn.Linear(20, 20)
        self.wide = nn.Linear(20, 8, bias=False)
        self.row = nn.Linear(8, 1)
        self.column = nn.Linear(1, 8)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = self.wide(torch.tanh(self.square(torch.tanh(self.tall(self.table(ids))))))
        return h + self.column(self.row(h)), self.conv(image)


class Case(NamedTuple):
    model: nn.Module
    inputs: dict[str, Tensor]


ALL = ["{table,conv,tall,square,wide,row,column}"]


def case(dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    model = Sites().eval().to(dtype)
    return Case(model, {"ids": torch.randint(1, 11, (2, 9)), "image": torch.randn(2, 3, 9, 8, dtype=dtype)})


def adapted(it: Case, targets: list[str] = ALL, **options: Any) -> Compiled:
    spec = {"version": 1, "passes": [{"type": "adapt", "targets": targets, **options}]}
    return lrc.compile(it.model, spec, inputs=it.inputs)


def merged(made: Compiled, it: Case) -> Compiled:
    return lrc.compile(made.program, MERGE, inputs=it.inputs)


def train(program: Program, size: float = 0.1) -> None:
    """Train, in effect: add random numbers to whatever is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in program.graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def distance(a: Any, b: Any) -> float:
    """The largest difference of two tuples of outputs, over their size."""
    return max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(a, b, strict=True))


def trained(made: LinearMap | nn.Module) -> int:
    return sum(p.numel() for p in made.parameters() if p.requires_grad)
