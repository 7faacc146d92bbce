"""What stays dense since it is no site is named, and a compile in memory leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc


class Experts(nn.Module):
    """A product with every expert of a 3-D weight, and a linear."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.banks = nn.ParameterList([nn.Parameter(torch.randn(3, 12, 12)) for _ in range(count)])
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(3, -1, -1)
        for bank in self.banks:
            h = torch.einsum("eti,eio->eto", h, bank)
        made: Tensor = self.fc(h.sum(0))
        return made


def spec(**options: Any) -> dict[str, Any]:
    return {"version": 1, "passes": [{"type": "factorize", "solver": "svd", "rank": 3}], **options}


@pytest.mark.parametrize("count", [1, 5])
def test_experts_stay_dense_and_the_plan_names_them(count: int) -> None:
    torch.manual_seed(0)
    done = lrc.compile(Experts(count), spec(), inputs={"x": torch.randn(4, 12)})
    assert list(done.program.maps) == ["fc"]
    (note,) = [note for note in done.plan.notes if note.startswith("no sites")]
    assert f"({count * 3 * 12 * 12} of {done.plan.parameters[1]} parameters)" in note
    assert "banks.0 (3, 12, 12), read by einsum" in note
    assert note.endswith("and 2 more") == (count == 5)
    assert note in " ".join(done.report.split())  # which wraps long lines


def test_a_model_of_sites_alone_has_no_such_note() -> None:
    done = lrc.compile(nn.Sequential(nn.Conv1d(8, 8, 3)), spec(), inputs={"input": torch.randn(4, 8, 9)})
    assert not [note for note in done.plan.notes if note.startswith("no sites")]


def test_a_mapping_without_an_output_leaves_no_cache_in_the_folder(in_tmp: Path) -> None:
    lrc.compile(nn.Sequential(nn.Linear(12, 12)), spec(), inputs={"input": torch.randn(4, 12)})
    assert not list(in_tmp.iterdir())
    lrc.compile(nn.Sequential(nn.Linear(12, 12)), spec(output="made/out"), inputs={"input": torch.randn(4, 12)})
    assert [path.name for path in (in_tmp / "made").iterdir()] == [".lrc-cache"]
