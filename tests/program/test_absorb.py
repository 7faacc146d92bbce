"""The order of pivoted outputs moves into the readers wherever only elementwise operations stand between."""

from collections.abc import Callable

import pytest
import torch
from models import apart, low_rank
from torch import Tensor, nn
from torch.nn import functional as F

from lrc.maps import Dense, Pivoted
from lrc.program import Program, Site
from lrc.program.absorb import absorb_permutations
from lrc.program.capture import capture_module


def shuffled(site: Site, rank: int = 3, side: str = "out") -> Pivoted:
    """Return a pivoted map of a site's shape in a random order that is not 0, 1, 2, …."""
    generator = torch.Generator().manual_seed(sum(map(ord, site.fqn)))
    rows, columns = site.shape if side == "out" else site.shape[::-1]
    P, Z = torch.randn(rank, columns, generator=generator), torch.randn(rows - rank, rank, generator=generator)
    index = torch.randperm(rows, generator=generator).roll(1)
    assert not torch.equal(index, torch.arange(rows))
    bias = None if site.bias is None else site.bias.detach()
    return Pivoted(P if side == "out" else P.T.contiguous(), Z, index, side, bias)  # type: ignore[arg-type]


def indexed(program: Program) -> list[str]:
    return [fqn for fqn, made in program.maps.items() if isinstance(made, Pivoted) and made.index is not None]


def check(
    model: nn.Module, example: Tensor, pivoted: list[str], *, dense: tuple[str, ...] = ()
) -> tuple[Program, dict[str, str]]:
    """Put pivoted maps at some sites and products at the others, absorb, and see that the output is the same."""
    torch.manual_seed(0)
    program = capture_module(model, example)
    for fqn, site in program.sites.items():
        if fqn not in dense:
            program.replace(fqn, shuffled(site) if fqn in pivoted else low_rank(site, 2), "factorize")
    x = torch.randn_like(example)
    before = program(x)["output"].detach()
    kept = {fqn: program.maps[fqn] for fqn in program.maps}
    notes = absorb_permutations(program)
    assert apart(program(x)["output"], before) <= 1e-6 * max(1.0, float(before.abs().max()))
    for fqn, made in program.maps.items():
        assert made.out_features == kept[fqn].out_features
        assert program.made_by[fqn] == "factorize"
        assert (made is kept[fqn]) or notes
    text = str(program)
    assert absorb_permutations(program) == {}  # nothing is left to do
    assert str(program) == text
    return program, notes


class Mlp(nn.Module):
    """up -> something -> down, of which only the last dimension of the middle matters."""

    def __init__(self, act: Callable[[Tensor], Tensor], *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8, bias=bias)
        self.down = nn.Linear(8, 5)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8, bias=False)
        self.up = nn.Linear(6, 8, bias=False)
        self.down = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    "act",
    [F.gelu, F.relu, torch.tanh, lambda h: h, lambda h: 0.5 * h * (1 + torch.tanh(h.pow(2)))],
    ids=["gelu", "relu", "tanh", "nothing", "polynomial"],
)
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_up_gelu_down_loses_its_index(act: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    program, notes = check(Mlp(act), torch.randn(shape), ["up"])
    assert indexed(program) == []
    assert notes == {"up": "output order absorbed by down"}


def test_a_number_a_row_does_not_stand_in_the_way() -> None:
    class Weighted(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * x.sum(-1, keepdim=True))

    program, notes = check(Weighted(F.relu), torch.randn(3, 6), ["up"])
    assert indexed(program) == []
    assert notes == {"up": "output order absorbed by down"}


def test_a_map_without_a_bias_and_a_dense_reader_work_too() -> None:
    program, notes = check(Mlp(F.relu, bias=False), torch.randn(3, 6), ["up"])
    assert (indexed(program), list(notes)) == ([], ["up"])
    torch.manual_seed(0)
    program = capture_module(Mlp(F.relu), torch.randn(3, 6))
    program.replace("up", shuffled(program.sites["up"]))
    program.replace("down", Dense(*program.sites["down"].map.dense()))
    x = torch.randn(4, 6)
    before = program(x)["output"].detach()
    assert absorb_permutations(program) == {"up": "output order absorbed by down"}
    assert apart(program(x)["output"], before) <= 1e-6 * float(before.abs().max())


def test_of_two_pivoted_maps_of_a_gated_mlp_one_loses_its_index() -> None:
    program, notes = check(Gated(), torch.randn(3, 4, 6), ["gate", "up"])
    assert indexed(program) == ["up"]
    assert notes == {"gate": "output order absorbed by down"}
    program.export()  # and the graph is whole


@pytest.mark.parametrize("pivoted", ["gate", "up"])
def test_one_pivoted_map_of_a_gated_mlp_loses_its_index_and_the_other_map_follows(pivoted: str) -> None:
    program, notes = check(Gated(), torch.randn(3, 4, 6), [pivoted])
    assert indexed(program) == []
    assert list(notes) == [pivoted]


def test_a_reader_with_an_index_of_its_own_stays_whole() -> None:
    torch.manual_seed(0)
    program = capture_module(Mlp(F.relu), torch.randn(3, 6))
    program.replace("up", shuffled(program.sites["up"]))
    program.replace("down", shuffled(program.sites["down"], side="in"))
    x = torch.randn(4, 6)
    before = program(x)["output"].detach()
    assert list(absorb_permutations(program)) == ["up"]
    assert indexed(program) == ["down"]
    assert apart(program(x)["output"], before) <= 1e-6 * float(before.abs().max())


@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.softmax(-1),
        lambda h: h - h.mean(-1, keepdim=True),
        lambda h: F.layer_norm(h, (8,)),
        lambda h: h.cumsum(-1),
        lambda h: h.flip(-1),
        lambda h: h * torch.arange(8.0),
        lambda h: h.reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
        lambda h: torch.cat([h[:, :4], h[:, 4:]], -1),
    ],
    ids=["softmax", "mean", "layer_norm", "cumsum", "flip", "a_vector", "heads", "halves"],
)
def test_nothing_is_absorbed_through_what_depends_on_the_order(act: Callable[[Tensor], Tensor]) -> None:
    program, notes = check(Mlp(act), torch.randn(3, 6), ["up"])
    assert indexed(program) == ["up"]
    assert notes == {}


def test_a_stored_vector_is_not_reordered() -> None:
    class Scaled(Mlp):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * self.scale)

    program, notes = check(Scaled(), torch.randn(3, 6), ["up"])
    assert (indexed(program), notes) == (["up"], {})


def test_a_residual_stream_keeps_its_order() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x))

    program, notes = check(Residual(), torch.randn(3, 6), ["a"])
    assert (indexed(program), notes) == (["a"], {})


def test_an_order_that_leaves_the_program_is_kept() -> None:
    class Returned(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return torch.cat([self.down(h), h], -1)

    program, notes = check(Returned(F.relu), torch.randn(3, 6), ["up"])
    assert (indexed(program), notes) == (["up"], {})
    program, notes = check(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(3, 6), ["0"])
    assert (indexed(program), notes) == (["0"], {})


def test_a_dense_reader_that_no_pass_has_touched_is_left_alone() -> None:
    program, notes = check(Mlp(F.gelu), torch.randn(3, 6), ["up"], dense=("down",))
    assert (indexed(program), notes) == (["up"], {})
    assert list(program.maps) == ["up"]
    program, notes = check(Gated(), torch.randn(3, 6), ["up"], dense=("gate",))
    assert (indexed(program), notes) == (["up"], {})


def test_every_reader_takes_the_new_order() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8)
            self.left = nn.Linear(8, 5)
            self.right = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return self.left(h) - self.right(torch.tanh(h))

    program, notes = check(Wide(), torch.randn(3, 6), ["up"])
    assert indexed(program) == []
    assert notes == {"up": "output order absorbed by left, right"}
    program, notes = check(Wide(), torch.randn(3, 6), ["up"], dense=("right",))
    assert (indexed(program), notes) == (["up"], {})


@pytest.mark.parametrize("part", ["up", "down"])
def test_a_weight_that_is_used_twice_is_left_alone(part: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8)
            self.down = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return self.down(F.relu(self.up(self.down(h)))) if part == "up" else self.down(h) + self.down(h * h)

    program, notes = check(Twice(), torch.randn(3, 6), ["up"])
    assert (indexed(program), notes) == (["up"], {})


def test_two_layers_in_a_row_both_lose_their_index() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.b = nn.Linear(8, 7)
            self.c = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    program, notes = check(Deep(), torch.randn(3, 6), ["a", "b"])
    assert indexed(program) == []
    assert list(notes) == ["a", "b"]
