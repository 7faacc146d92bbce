"""What passes that store weights in another way do with a weight that something else reads too, and with a damaged one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import LrcError
from lrc.maps import Dense

BATCH = {"ids": torch.arange(40).reshape(4, 10)}
STEPS: dict[str, dict[str, Any]] = {
    "quantize": {"type": "quantize", "format": "int8"},
    "feedback": {"type": "quantize", "format": "nf4", "rounding": "feedback"},
    "split": {"type": "split", "solver": "lq", "rank": 2},
    "prune": {"type": "prune", "method": {"type": "unstructured", "criterion": "magnitude", "density": 0.2}},
    "auto": {"type": "auto", "budget": {"bytes_kept": 0.3}},
}


class Tied(nn.Module):
    """An embedding that its head shares, and a linear between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(40, 48), nn.Linear(48, 48), nn.Linear(48, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.middle(self.embedding(ids))))
        return logits


def compiled(name: str, model: nn.Module, **more: Any) -> lrc.Compiled:
    spec = {"version": 1, "passes": [STEPS[name] | more]}
    return lrc.compile(model, spec, inputs=BATCH, calibration=[BATCH], cache=Path("cache"))


@pytest.mark.parametrize("name", STEPS)
def test_a_tied_head_stays_and_nothing_is_stored_twice(name: str) -> None:
    torch.manual_seed(0)
    done = compiled(name, Tied().eval())
    kept = {d.sites[0]: d.keep for d in done.plan.decisions}
    assert str(kept["head"]).startswith("tied: embedding reads the same weight")
    assert kept["middle"] is None
    assert isinstance(done.program.sites["head"].map, Dense)
    assert done.plan.bytes[1] < done.plan.bytes[0]


@pytest.mark.parametrize("name", ["quantize", "split"])
def test_a_tied_head_gets_a_map_of_its_own_when_asked(name: str) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    done = compiled(name, model, tied="untie", targets=["head"])
    assert not isinstance(done.program.sites["head"].map, Dense)
    assert torch.equal(done.graft().get_parameter("embedding.weight"), model.embedding.weight)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    with torch.no_grad():
        model.middle.weight[3, 5] = value
    with pytest.raises(LrcError, match=r"middle.*finite"):
        compiled(name, model)
