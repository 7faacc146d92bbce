"""Small networks with everything that ties channels, and the model that a pruned one must agree with."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.dependency import Group, Groups, living

Gone = dict[str, NDArray[np.int64]]


class Residual(nn.Module):
    """A ResNet for small images: batch norms, a convolution in the shortcut, or channels of zeros (`zeros`)."""

    def __init__(self, zeros: bool = False) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.a1_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a2, self.a2_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b1, self.b1_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b2, self.b2_norm = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.down = None if zeros else nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.a2_norm(self.a2(F.relu(self.a1_norm(self.a1(x))))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) if self.down is None else self.down(x)
        x = F.relu(short + self.b2_norm(self.b2(F.relu(self.b1_norm(self.b1(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Separable(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excitation, and an image flattened into a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=4)
        self.last = nn.Conv2d(12, 6, 1)
        self.fc, self.head = nn.Linear(6 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.hardswish(self.up_norm(self.up(x))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.max_pool2d(self.last(F.relu(self.grouped(x))), 4)
        return self.head(torch.tanh(self.fc(x.flatten(1))))


class Joined(nn.Module):
    """Concatenation, a split in two unequal parts, a gated unit, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.both = nn.Conv2d(10, 10, 3, padding=1)
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(7, 8, 1)
        self.gated, self.after = nn.Linear(8, 12), nn.Linear(6, 8)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(torch.relu(torch.cat([self.left(x), self.right(x)], 1)))
        first, second = x.split([3, 7], 1)
        x = torch.relu(self.one(first) + self.two(second)).mean((2, 3))
        value, gate = self.gated(x).chunk(2, -1)
        x = self.after(value * torch.sigmoid(gate))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


class Grouped(nn.Module):
    """Group norms: of several groups, of one channel a group around a residual, and of all channels together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.a, self.a_norm = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.GroupNorm(12, 12)
        self.b, self.b_norm = nn.Conv2d(12, 6, 1), nn.GroupNorm(1, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.a_norm(self.a(x)))
        return self.head(F.relu(self.b_norm(self.b(x))).mean((2, 3)))


class Attending(nn.Module):
    """A block with `nn.MultiheadAttention`, whose heads are within the batch; `cross`: with keys of another width."""

    def __init__(self, cross: bool = False, weights: bool = False, **options: bool) -> None:
        super().__init__()
        self.weights = weights
        self.norm = nn.LayerNorm(20)
        more = {"kdim": 8, "vdim": 12} if cross else {}
        self.keys, self.values = (nn.Linear(20, 8), nn.Linear(20, 12)) if cross else (nn.Identity(), nn.Identity())
        self.attn = nn.MultiheadAttention(20, 4, **options, **more)
        self.up, self.down = nn.Linear(20, 24), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, self.keys(h), self.values(h), need_weights=self.weights)[0]
        return x + self.down(torch.relu(self.up(x)))


def net(kind: str) -> nn.Module:
    """Return a network in eval mode with norms that do something, the same one every time."""
    torch.manual_seed(0)
    kinds: Mapping[str, Callable[[], nn.Module]] = {
        "residual": Residual, "zeros": lambda: Residual(True), "separable": Separable, "joined": Joined, "grouped": Grouped,
    }  # fmt: skip
    made = kinds[kind]().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return made


def image_program(kind: str) -> tuple[Program, Tensor]:
    """Return a captured network and images for it."""
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return capture_module(net(kind), [x]), x


def half(groups: Groups, seed: int = 0) -> Gone:
    """Return every second unit of every group, drawn."""
    generator = np.random.default_rng(seed)
    return {g.name: np.sort(generator.permutation(g.units)[: g.units // 2]) for g in groups.groups}


def masked(program: Program, groups: Groups, gone: Mapping[str, NDArray[np.int64]]) -> Program:
    """Return the program with zeros where units are to go: rows, columns and biases."""
    made, alive, slots = program.clone(), living(groups, gone), groups.flow.ledger.slots
    for fqn, site in list(made.sites.items()):
        out, read = slots.get(("site", fqn, "out")), slots.get(("site", fqn, "in"))
        if site.kind == "embedding" or site.tied or not isinstance(out, np.ndarray):
            continue
        weight, bias = (None if part is None else part.clone() for part in site.map.exact())
        assert weight is not None
        dead = torch.from_numpy(~alive[out])
        weight[dead] = 0
        if bias is not None:
            bias[dead] = 0
        if read is not None:
            weight.reshape(len(weight), len(read), -1)[:, torch.from_numpy(~alive[read])] = 0
        new = site.layout.dense(weight.to(site.dtype), None if bias is None else bias.to(site.dtype))
        made.replace(fqn, new, settle=False)
    made.settle()
    return made


def group_of(groups: Groups, fqn: str) -> Group:
    """Return the group whose units a site gives."""
    return next(g for g in groups.groups for m in g.members if m.slot == ("site", fqn, "out"))
