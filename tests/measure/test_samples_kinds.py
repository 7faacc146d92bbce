"""What is measured sample by sample at convolutions and embeddings: each against autograd, and what the solvers make of it."""

from typing import Any

import pytest
import torch
from test_samples import BOTH, SEED, WEIGHT_FISHER, close, sent_for, squares
from torch import Tensor, nn

import lrc
from lrc.data import batches_of
from lrc.errors import SiteError
from lrc.measure import collect
from lrc.program.capture import capture_module
from lrc.solvers import Moments


class Images(nn.Module):
    """A convolution in groups, a strided one, one that reads the same value as the last, and one along time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(6, 4, (3, 2), stride=2, dilation=(1, 2))
        self.wide = nn.Conv2d(6, 4, 1, stride=2)
        self.along = nn.Conv1d(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        y = self.strided(h).flatten(2)
        made: Tensor = self.along(y).mean(2) + self.wide(h).mean((1, 2, 3))[:, None]
        return made


class Texts(nn.Module):
    """A table with a padding row that is read twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 5, padding_idx=0)
        self.fc = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.fc((self.table(ids) + self.table(ids.flip(0))).tanh().sum(1))
        return made


def images(*sizes: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    items = [{"x": torch.randn(n, 4, 7, 8, dtype=torch.float64)} for n in sizes]
    return Images().double().eval(), items


def texts(*sizes: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Texts().double().eval(), [{"ids": torch.randint(0, 10, (n, 6))} for n in sizes]


def measured(model: nn.Module, items: list[dict[str, Tensor]], fqns: list[str], needs: Any) -> dict[str, Moments]:
    program = capture_module(model, items[0])
    return collect(program, batches_of(items, list(items[0])), fqns, needs, fisher="outputs", seed=SEED)


def test_the_weight_fisher_of_a_convolution_is_the_mean_square_of_what_autograd_finds() -> None:
    model, items = images(3, 2)
    names = ["first", "strided", "wide", "along"]
    found = measured(model, items, names, WEIGHT_FISHER)
    losses: list[Tensor] = []
    for place, item in enumerate(items):
        output = model(**item)
        losses += list((output * sent_for(item, output.detach(), place, None, "outputs")).flatten(1).sum(1))
    for name in names:
        expected = squares(model.get_parameter(f"{name}.weight"), losses).flatten(1)
        assert float(expected.max()) > 0
        assert close(found[name].weight_fisher, expected, 2000)


def test_the_weight_fisher_of_a_table_is_that_of_its_rows_and_none_of_padding() -> None:
    class Once(Texts):
        def forward(self, ids: Tensor) -> Tensor:
            made: Tensor = self.fc(self.table(ids).tanh().sum(1))
            return made

    torch.manual_seed(0)
    model, (_, items) = Once().double().eval(), texts(3, 2)
    found = measured(model, items, ["table"], WEIGHT_FISHER)["table"].weight_fisher
    losses: list[Tensor] = []
    for place, item in enumerate(items):
        output = model(**item)
        losses += list((output * sent_for(item, output.detach(), place, None, "outputs")).flatten(1).sum(1))
    expected = squares(model.get_parameter("table.weight"), losses).T
    assert close(found, expected, 2000)
    assert found is not None
    assert float(found[:, 0].max()) == 0
    assert float(found[:, 10:].max()) == 0


def test_magnitudes_are_those_of_patches_and_the_shares_of_rows() -> None:
    model, items = images(3, 2)
    found = measured(model, items, ["first", "along"], BOTH)
    patches = [nn.functional.unfold(item["x"], 3, padding=1).abs().mean(2) for item in items]  # (samples, channels * 9)
    assert close(found["first"].magnitudes, torch.cat(patches).mean(0).reshape(2, -1), 2000)
    model, items = texts(3, 2)
    shares = measured(model, items, ["table"], BOTH)["table"].magnitudes
    counts = [torch.stack([ids.bincount(minlength=12) for ids in item["ids"]]).double() for item in items]
    both = [c + c.flip(0) for c in counts]
    assert close(shares, torch.cat([c / c.sum(1, keepdim=True) for c in both]).mean(0), 2000)


def compiled(model: nn.Module, items: list[dict[str, Tensor]], targets: list[str], solver: Any, folder: Any) -> lrc.Compiled:
    spec = {"version": 1, "passes": [{"type": "factorize", "targets": targets, "solver": solver, "rank": 2}]}
    return lrc.compile(model, spec, inputs=items[0], calibration=items, cache=folder / "cache")


def scales(moments: Moments, solver: str, groups: int) -> Tensor:
    """What the columns of every group's block are scaled by: the norm that the solver minimises, (groups, in_features)."""
    if solver == "asvd":
        assert moments.magnitudes is not None
        return moments.magnitudes.reshape(groups, -1).sqrt() + 1e-6
    assert moments.weight_fisher is not None
    return torch.stack([block.sum(0).sqrt() for block in moments.weight_fisher.chunk(groups)])


@pytest.mark.parametrize("solver", ["asvd", "fwsvd"])
@pytest.mark.parametrize("make", [images, texts])
def test_no_weight_of_the_rank_is_closer_in_the_solvers_own_norm(make: Any, solver: str, tmp_path: Any) -> None:
    """The least error of a rank-2 block is the norm of the scaled block's other singular values (Eckart & Young)."""
    model, items = make(4, 4)
    targets = ["first", "strided"] if make is images else ["table"]
    options: Any = solver if solver == "asvd" else {"type": solver, "fisher": "outputs"}
    done = compiled(model, items, targets, options, tmp_path)
    program = capture_module(model, items[0])
    moments = collect(program, batches_of(items, list(items[0])), targets, BOTH, fisher="outputs", seed=0)
    for fqn in targets:
        W, groups = program.map_of(fqn).exact().weight, program.sites[fqn].layout.groups
        found = done.program.map_of(fqn).exact().weight
        columns = scales(moments[fqn], solver, groups)
        least = error = 0.0
        for g, (rows, made) in enumerate(zip(W.chunk(groups), found.chunk(groups), strict=True)):
            least += float((torch.linalg.svdvals(rows * columns[g])[2:] ** 2).sum())
            error += float((((rows - made) * columns[g]) ** 2).sum())
        floor = 1e-6 * float((W.norm() * columns.max()) ** 2)  # what columns without information are lifted to
        assert least - 1e-9 <= error <= least * (1 + 1e-6) + floor


@pytest.mark.parametrize("make", [images, texts])
def test_altmin_by_fisher_weights_rewrites_convolutions_and_tables(make: Any, tmp_path: Any) -> None:
    model, items = make(4, 4)
    targets = ["first", "strided"] if make is images else ["table"]
    done = compiled(model, items, targets, {"type": "altmin", "weights": "fisher"}, tmp_path)
    assert set(done.program.maps) == set(targets)
    with torch.no_grad():
        assert bool(done.module(**items[0]).isfinite().all())


def test_bags_are_refused_with_the_reason() -> None:
    class Clicks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(12, 5, mode="sum")

        def forward(self, ids: Tensor) -> Tensor:
            made: Tensor = self.table(ids)
            return made

    with pytest.raises(SiteError, match="one of kind `embedding_bag`"):
        measured(Clicks(), texts(3)[1], ["table"], WEIGHT_FISHER)
