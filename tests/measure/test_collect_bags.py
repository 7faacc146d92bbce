"""Moments of bags: what a bag holds is a vector of counts, whose second moment is kept on the diagonal."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.measure import Cache, collect
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.solvers import Need
from tests.models import batches

ALL = frozenset({Need.INPUTS, Need.GRADIENTS})
F64 = torch.float64
ROWS = 11


class Clicks(nn.Module):
    """Bags of one table, and a linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(ROWS, 6, **options)
        self.fc = nn.Linear(6, 3)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.fc(torch.tanh(self.table(ids, offsets, weights)))


def made(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Clicks(**options).double().eval()


def whole(options: dict[str, Any]) -> tuple[nn.Module, Program, list[dict[str, Tensor]]]:
    model = made(**options)
    items = [{"ids": torch.randint(0, ROWS, (n, 4))} for n in (5, 3)]
    return model, capture_module(model, items[0]), items


def flat() -> tuple[nn.Module, Program, list[dict[str, Tensor]]]:
    model = made(mode="sum")
    items = []
    for _ in range(2):
        weights = torch.randn(9, dtype=F64)
        items.append({"ids": torch.randint(0, ROWS, (9,)), "offsets": torch.tensor([0, 2, 2, 6]), "weights": weights})
    return model, capture_module(model, items[0], dynamic={}), items


def vectors(options: dict[str, Any], item: dict[str, Tensor]) -> Tensor:
    """The vectors that the table is multiplied with: bags of unit vectors."""
    unit = nn.EmbeddingBag.from_pretrained(torch.eye(ROWS, dtype=F64), **options)
    return unit(item["ids"], item.get("offsets"), item.get("weights"))


@pytest.mark.parametrize(
    "options", [{"mode": "mean"}, {"mode": "sum", "padding_idx": 2}, {"mode": "mean", "padding_idx": 0}, {}]
)
def test_moments_of_bags_are_those_of_their_counts(options: dict[str, Any]) -> None:
    model, program, items = whole(options) if options else flat()
    site = program.sites["table"]
    assert (site.kind, site.type_name, site.shape, site.has_module) == ("embedding_bag", "EmbeddingBag", (6, ROWS), True)
    found = collect(program, batches(*items), ["table"], ALL, fisher="outputs", seed=3)["table"]
    options = options or {"mode": "sum"}
    x = torch.cat([vectors(options, item) for item in items])
    assert found.tokens == len(x)
    assert torch.allclose(found.gram, x.square().mean(0))  # type: ignore[arg-type]
    assert torch.allclose(found.mean, x.mean(0))  # type: ignore[arg-type]
    rows = []
    for place, item in enumerate(items):
        y = vectors(options, item) @ model.table.weight  # type: ignore[operator]
        y = y.detach().requires_grad_()
        out = model.fc(torch.tanh(y))  # type: ignore[operator]
        generator = torch.Generator().manual_seed(3 * 1_000_003 + place)
        sent = torch.randn(out.shape, generator=generator, dtype=torch.float32).double()
        rows.append(torch.autograd.grad(out, y, sent)[0])
    g = torch.cat(rows)
    assert torch.allclose(found.fisher, g.T @ g / len(g))  # type: ignore[arg-type]
    weight = g.float().square().sum(1).double()
    assert torch.allclose(found.weighted_gram, (x.square() * weight[:, None]).sum(0) / weight.sum(), rtol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(found.weighted_mean, (x * weight[:, None]).sum(0) / weight.sum(), rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_moments_of_bags_come_back_from_the_cache(tmp_path: Any) -> None:
    _, program, items = flat()
    cache = Cache(tmp_path)
    first = collect(program, batches(*items), ["table"], ALL, cache=cache, key="k")["table"]
    again = collect(program, batches(), ["table"], ALL, cache=cache, key="k")["table"]
    for name in ("gram", "mean", "fisher", "weighted_gram", "weighted_mean"):
        assert torch.equal(getattr(first, name), getattr(again, name))
