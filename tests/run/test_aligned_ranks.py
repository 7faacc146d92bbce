"""`round_to: auto` in a run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lrc
from lrc.errors import SpecError
from lrc.run.session import alignment, settled
from lrc.spec.load import load_document

Compile = Callable[..., lrc.Compiled]


def wide() -> tuple[nn.Module, dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    items = [{"input": torch.randn(16, 64)} for _ in range(3)]
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval(), items[0], items[1:]


@pytest.mark.parametrize(("name", "step"), [("AVX512", 16), ("AVX2", 8)])
@pytest.mark.parametrize("rank", [{"params_kept": 0.7}, 21])
def test_ranks_are_multiples_of_the_vector_and_the_plan_says_so(
    name: str, step: int, rank: Any, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    model, inputs, items = wide()
    done = compiled(model, inputs=inputs, calibration=items, targets=["**"], solver="kfac", rank=rank, round_to="auto")
    ranks = [d.rank for d in done.plan.decisions if d.rank is not None]
    assert ranks
    assert all(found % step == 0 for found in ranks)
    notes = [note for note in done.plan.notes if "round_to" in note]
    assert notes == [
        f"ranks are multiples of {step} (`round_to: auto`): {4 * step} bytes, vectors of {name}, hold {step} numbers of float32"
    ]
    assert notes[0] in done.report


def test_under_a_budget_of_time_the_measured_times_decide() -> None:
    document, _ = load_document(
        {"version": 1, "passes": [{"type": "factorize", "rank": {"latency_kept": 0.7}, "round_to": "auto"}]}
    )
    (options,) = document.passes
    program = lrc.capture(wide()[0], inputs=wide()[1])
    assert alignment(program, options) == (1, "the times that were measured decide")
    assert settled(program, options).round_to == 1


@pytest.mark.parametrize("given", [0, "best", 1.5])
def test_other_steps_are_refused(given: Any) -> None:
    with pytest.raises(SpecError, match="round_to"):
        load_document({"version": 1, "passes": [{"type": "factorize", "rank": 4, "round_to": given}]})
