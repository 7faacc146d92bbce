"""Operators that move or scale channels in ways of their own: what is cut is the masked model, or it stays whole."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import half, masked
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.dependency import cut_units, find_groups

Between = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """Two layers with something between them."""

    def __init__(self, first: nn.Module, between: nn.Module | Between, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def cut(first: nn.Module, between: nn.Module | Between, last: nn.Module, x: Tensor, stay: int | None = None) -> Program:
    """Take half of all units out, or all but the first few (`stay`), hold the rest to the masked model, and return it."""
    torch.manual_seed(0)
    program = capture_module(Around(first, between, last).eval(), [x])
    groups = find_groups(program)
    gone = half(groups) if stay is None else {g.name: np.arange(stay, g.units) for g in groups.groups}
    expected, made = masked(program, groups, gone), program.clone()
    cut_units(made, groups, gone, "prune")
    with torch.no_grad():
        torch.testing.assert_close(made(x)["output"], expected(x)["output"], rtol=0, atol=1e-5)
    return made


@pytest.mark.parametrize(
    ("first", "last", "shape"),
    [
        (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), (2, 3, 8, 8)),
        (nn.Linear(6, 8), nn.Linear(8, 5), (2, 8, 6)),
        (nn.Linear(6, 8), nn.Linear(8, 5), (2, 6)),
    ],
    ids=["channels", "tokens", "features"],
)
def test_slopes_of_a_prelu_go_with_its_second_dimension(first: nn.Module, last: nn.Module, shape: tuple[int, ...]) -> None:
    slopes = nn.PReLU(8)
    nn.init.uniform_(slopes.weight, 0.1, 0.9)
    made = cut(first, slopes, last, torch.randn(*shape))
    stay = 8 if len(shape) == 3 else 4
    assert made.tensors()["between.weight"].numel() == stay
    assert made.sites["first"].out_features == 4


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_features_that_a_padding_copies_stay(mode: str) -> None:
    made = cut(nn.Linear(6, 8), lambda h: F.pad(h, (2, 2), mode=mode), nn.Linear(12, 5), torch.randn(3, 4, 6))
    assert made.sites["first"].out_features == 8


def test_channels_of_an_image_that_a_padding_copies_the_edges_of_go() -> None:
    made = cut(
        nn.Conv2d(3, 8, 3), lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"), nn.Conv2d(8, 5, 3), torch.randn(2, 3, 8, 8)
    )
    assert made.sites["first"].out_features == 4


@pytest.mark.parametrize("pool", [lambda h: F.max_pool1d(h, 2), lambda h: F.adaptive_avg_pool1d(h, 4)])
def test_features_that_a_pool_without_a_batch_is_taken_over_stay(pool: Between) -> None:
    made = cut(nn.Linear(6, 8), pool, nn.Linear(4, 5), torch.randn(3, 6))
    assert made.sites["first"].out_features == 8


@pytest.mark.parametrize("squeeze", [lambda h: h.mean((2, 3), True).squeeze(), lambda h: h.squeeze(1).mean((2, 3))])
def test_a_squeeze_keeps_the_channels_of_which_one_stays(squeeze: Between) -> None:
    made = cut(nn.Conv2d(3, 4, 3), squeeze, nn.Linear(4, 5), torch.randn(2, 3, 8, 8), stay=1)
    assert made.sites["first"].out_features == 1


def test_linears_behind_a_recurrence_are_cut() -> None:
    """Its operator runs on no sizes that are not known, and has nothing to do with what is cut."""
    lstm = nn.LSTM(8, 12, batch_first=True)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.up, self.down = lstm, nn.Linear(12, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(self.lstm(x)[0])))

    x = torch.randn(2, 7, 8)
    made = cut(nn.Identity(), Read(), nn.Identity(), x)
    assert made.sites["between.up"].out_features == 5
    assert made(torch.randn(3, 4, 8))["output"].shape == (3, 4, 3)


def test_an_empty_rest_of_what_is_turned_ties_nothing() -> None:
    """As of Phi-3, which turns all features of a head and joins them to the none that it does not."""

    def turned(h: Tensor) -> Tensor:
        heads = h.view(2, 5, 4, 2)
        return torch.cat([heads[..., :2] * 2, heads[..., 2:]], -1).flatten(2)

    made = cut(nn.Linear(6, 8), turned, nn.Linear(8, 5), torch.randn(2, 5, 6))
    assert made.sites["first"].out_features == 4
