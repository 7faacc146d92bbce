"""Moments of a weight that a head multiplies and an embedding looks up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.errors import SiteError
from lrc.measure import Cache, collect
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.solvers import Need
from lrc.solvers.kronecker import joined
from tests.models import batches

ALL = frozenset({Need.INPUTS, Need.GRADIENTS})
F64 = torch.float64
ROWS, SIZE = 9, 4


class Speaker(nn.Module):
    """A language model of one tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, SIZE)
        self.mix = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(input_ids).cumsum(1))))


def speaker() -> tuple[Speaker, Program, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Speaker().double().eval()
    items = [{"input_ids": torch.randint(0, ROWS, (n, 5))} for n in (3, 2)]
    program = capture_module(model, items[0])
    assert program.sites["head"].tied == ("embedding",)
    program.join("head")
    program.join("head")  # once is enough
    return model, program, items


def by_hand(model: Speaker, items: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """Sums over tokens: h hᵀ, g_v² of the logits, counts, and g gᵀ of the embedding's outputs."""
    gram, squares = torch.zeros(SIZE, SIZE, dtype=F64), torch.zeros(ROWS, dtype=F64)
    counts, second = torch.zeros(ROWS, dtype=F64), torch.zeros(SIZE, SIZE, dtype=F64)
    for place, item in enumerate(items):
        ids = item["input_ids"]
        e = model.table(ids).detach().requires_grad_()
        h = torch.tanh(model.mix(e.cumsum(1)))
        out = model.head(h)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + place)
        sent = torch.randn(out.shape, generator=generator, dtype=torch.float32).double()
        g = torch.autograd.grad(out, e, sent)[0].reshape(-1, SIZE)
        rows = h.detach().reshape(-1, SIZE)
        gram += rows.T @ rows
        squares += sent.reshape(-1, ROWS).square().sum(0)
        counts += torch.bincount(ids.reshape(-1), minlength=ROWS)
        second += g.T @ g
    return gram, squares, counts, second


def test_joint_moments_are_one_product_of_both_uses(tmp_path: Path) -> None:
    model, program, items = speaker()
    cache = Cache(tmp_path)
    found = collect(program, batches(*items), ["head"], ALL, fisher="outputs", seed=5, cache=cache, key="k")["head"]
    gram, squares, counts, second = (value / 25 for value in by_hand(model, items))
    fisher, columns = joined([(squares, gram), (counts, second)])
    assert found.tokens == 25
    assert torch.allclose(found.fisher, fisher, rtol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(found.gram, columns, rtol=1e-5)  # type: ignore[arg-type]
    assert found.mean is found.weighted_gram is None
    again = collect(program, batches(), ["head"], ALL, fisher="outputs", seed=5, cache=cache, key="k")["head"]
    assert torch.equal(again.fisher, found.fisher)  # type: ignore[arg-type]
    assert torch.equal(again.gram, found.gram)  # type: ignore[arg-type]


def test_without_gradients_the_heads_inputs_decide() -> None:
    model, program, items = speaker()
    found = collect(program, batches(*items), ["head"], frozenset({Need.INPUTS}))["head"]
    assert torch.allclose(found.gram, by_hand(model, items)[0] / 25)  # type: ignore[arg-type]
    assert found.fisher is None


@pytest.mark.parametrize("need", [Need.MAGNITUDES, Need.WEIGHT_FISHER])
def test_samples_of_such_a_weight_are_not_measured(need: Any) -> None:
    _, program, items = speaker()
    with pytest.raises(SiteError, match=r"head: a weight that an embedding shares is not measured sample by sample"):
        collect(program, batches(*items), ["head"], frozenset({need}))
