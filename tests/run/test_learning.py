"""`allocate: learned` in a spec: who learns, what the plan says of it, and what is found again."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.measure import truncation
from lrc.ranks import Auto, LearnedAllocation
from lrc.ranks.allocate import Uniform
from lrc.run.learning import allocator
from lrc.run.pipeline import make_plan
from lrc.run.plan import totals
from lrc.run.session import Session
from lrc.spec.load import load_document

Compile = Callable[..., lrc.Compiled]
FEW = {"type": "learned", "steps": 12, "learning_rate": 0.1}


def options(**given: Any) -> Any:
    return load_document(tiny.factorize(rank={"params_kept": 0.5}, **given))[0].passes[0]


def test_dobi_learns_unless_another_allocator_is_named() -> None:
    assert allocator(options(solver="dobi")) == (Auto(), LearnedAllocation())
    assert allocator(options(solver="dobi", allocate="uniform")) == (Uniform(), None)
    assert allocator(options(solver="kfac")) == (Auto(), None)


def test_learned_is_a_word_or_a_mapping_and_works_with_every_nested_solver() -> None:
    assert allocator(options(solver="kfac", allocate="learned")) == (Auto(), LearnedAllocation())
    asked = options(solver="whitened", allocate=FEW)
    assert allocator(asked) == (Auto(), LearnedAllocation(steps=12, learning_rate=0.1))
    assert asked.model_dump()["allocate"] == LearnedAllocation(steps=12, learning_rate=0.1).model_dump()


@pytest.mark.parametrize("solver", ["dobi", "kfac"])
@pytest.mark.parametrize("form", ["two_factor", "auto"])
def test_the_budget_is_met_and_the_plan_says_what_was_learned(solver: str, form: str, compiled: Compile) -> None:
    done = compiled(solver=solver, rank={"params_kept": 0.5}, allocate=FEW, form=form)
    before, after = totals(done.plan.decisions)
    assert after <= 0.5 * before
    (note,) = done.plan.notes
    assert note.startswith("learned allocation: loss ")
    assert "after 12 steps, on data held back" in note


def test_a_rank_that_is_not_shared_is_not_learned(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "learn", lambda *_: pytest.fail("something was learned"))
    assert {d.rank for d in compiled(solver="dobi", rank=3).plan.decisions} == {3}


def test_everything_stays_where_the_budget_takes_all_of_it(compiled: Compile) -> None:
    done = compiled(solver="dobi", rank={"params_kept": 1.0})
    assert all(d.keep for d in done.plan.decisions)
    assert "nothing to choose" in done.plan.notes[0]


def test_what_was_learned_is_found_again(session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(solver="dobi", allocate=FEW)
    first = make_plan(tiny.captured_mlp(), [asked], session())
    monkeypatch.setattr(truncation, "Training", lambda *_: pytest.fail("something was learned again"))
    assert make_plan(tiny.captured_mlp(), [asked], session()) == first


class Mixed(nn.Module):
    """A table, a convolution over what it gives, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(20, 12), nn.Conv1d(12, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2))


@pytest.mark.parametrize("solver", ["dobi", "kfac"])
def test_tables_and_convolutions_are_learned_too(solver: str, compiled: Compile) -> None:
    torch.manual_seed(0)
    ids = [torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    done = compiled(
        Mixed().eval(), inputs=(ids[0],), calibration=[(batch,) for batch in ids], solver=solver,
        targets=["table", "conv", "head"], rank={"params_kept": 0.6}, allocate=FEW,
    )  # fmt: skip
    before, after = totals(done.plan.decisions)
    assert after <= 0.6 * before
    assert {d.name for d in done.plan.decisions} == {"table", "conv", "head"}
    assert done.plan.notes[0].startswith("learned allocation: loss ")
