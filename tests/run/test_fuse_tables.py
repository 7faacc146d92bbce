"""fuse_tables: equal outputs from narrower features, in every view, and what stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.lower.ort import OrtRunner
from lrc.maps import Lookup

FUSE = {"type": "fuse_tables"}


class Fields(nn.Module):
    """Numbers between two tables, one linear that reads all of it, and one that reads three fields of a table at once."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.tags = nn.Embedding(40, 8), nn.Embedding(30, 6), nn.Embedding(20, 8, padding_idx=0)
        self.wide = nn.Linear(6 + 4 + 8, 10)
        self.deep = nn.Linear(24, 10, bias=False)
        self.head = nn.Linear(10, 1)

    def forward(self, user: Tensor, item: Tensor, tags: Tensor, x: Tensor) -> Tensor:
        h = self.wide(torch.cat([self.item(item), x, self.user(user)], -1)) + self.deep(self.tags(tags).flatten(1))
        return self.head(torch.relu(h))


class Crossed(nn.Module):
    """A product of features beside the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.plain, self.fc = nn.Embedding(20, 6), nn.Embedding(20, 6), nn.Embedding(20, 6), nn.Linear(18, 5)

    def forward(self, i: Tensor) -> Tensor:
        a, b = self.a(i), self.b(i)
        return self.fc(torch.cat([a, b, self.plain(i)], -1)) + (a * b).sum(-1, keepdim=True)


def inputs(count: int = 5, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = {n: torch.randint(0, rows, (count,), generator=g) for n, rows in (("user", 40), ("item", 30))}
    return {**ids, "tags": torch.randint(0, 20, (count, 3), generator=g), "x": torch.randn(count, 4, generator=g)}


def fields() -> nn.Module:
    torch.manual_seed(0)
    return Fields().eval()


def compiled(model: nn.Module, given: Any, *passes: dict[str, Any], solver: Any = "afm") -> lrc.Compiled:
    step = {"type": "factorize", "targets": ["type:Embedding"], "solver": solver, "rank": 3, "form": "two_factor"}
    spec = {"version": 1, "passes": [step, *passes]}
    return lrc.compile(model, spec, inputs=given, calibration=[given if isinstance(given, dict) else {"i": given}])


@pytest.mark.parametrize("solver", ["afm", "svd"])
@torch.no_grad()
def test_outputs_are_those_of_the_table_and_its_matrix_in_every_view(solver: str, tmp_path: Path) -> None:
    model, given = fields(), inputs(64)
    plain, done = compiled(model, given, solver=solver), compiled(model, given, FUSE, solver=solver)
    x = inputs(9, seed=3)
    expected = plain.program(**x)["output"]
    torch.testing.assert_close(done.program(**x)["output"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(done.graft()(**x), expected, atol=1e-5, rtol=0)
    done.save(tmp_path / "saved")
    torch.testing.assert_close(lrc.load(tmp_path / "saved")(**x)["output"], expected, atol=1e-5, rtol=0)
    onnx = OrtRunner(done.to_onnx(tmp_path / "model.onnx"))
    torch.testing.assert_close(torch.as_tensor(onnx(**x)["output"]), expected, atol=1e-4, rtol=0)
    assert {name: site.shape for name, site in done.program.sites.items()} == {
        "user": (3, 40), "item": (3, 30), "tags": (3, 20), "wide": (10, 3 + 4 + 3), "deep": (10, 9), "head": (1, 10),
    }  # fmt: skip
    assert all(isinstance(done.program.maps[name], Lookup) for name in ("user", "item", "tags"))
    assert (done.program.map_of("deep").bias is not None) == (solver == "afm")  # which keeps the mean row


def test_the_plan_says_what_is_saved_and_a_second_time_changes_nothing() -> None:
    model, given = fields(), inputs(64)
    done = compiled(model, given, FUSE, FUSE, solver="svd")
    first, second = done.plan.of_pass(1), done.plan.of_pass(2)
    assert [d.notes for d in first] == [("its matrix goes into wide",)] * 2 + [("its matrix goes into deep",)]
    saved = sum(d.before.parameters - d.after.parameters for d in first)
    assert saved == 3 * (8 + 6 + 8) + 10 * (5 + 3 + 3 * 5)
    plain = compiled(model, given, solver="svd")
    assert plain.plan.parameters[1] - done.plan.parameters[1] == saved
    assert {d.keep for d in second} == {"no table with a matrix after it"}


@torch.no_grad()
def test_readers_in_two_factors_take_the_matrix_in() -> None:
    model, given = fields(), inputs(64)
    step = {"type": "factorize", "targets": ["wide"], "solver": "svd", "rank": 4, "form": "two_factor"}
    plain, done = compiled(model, given, step), compiled(model, given, step, FUSE)
    torch.testing.assert_close(done.program(**given)["output"], plain.program(**given)["output"], atol=1e-5, rtol=0)
    assert repr(done.program.maps["wide"]) == "Chain[10,4,10]"


@torch.no_grad()
def test_a_table_that_more_than_linears_read_stays_with_the_reason() -> None:
    torch.manual_seed(0)
    model, ids = Crossed().eval(), torch.randint(0, 20, (7,))
    done, plain = (compiled(model, ids, *passes, solver="svd") for passes in ((FUSE,), ()))
    reasons = {d.name: d.keep for d in done.plan.of_pass(1)}
    assert reasons == {"a": "mul reads its features, which is no linear", "b": reasons["a"], "plain": None}
    assert done.program.sites["fc"].in_features == 6 + 6 + 3
    torch.testing.assert_close(done.program(ids)["output"], plain.program(ids)["output"], atol=1e-5, rtol=0)


def test_the_rewritten_graph_reads_as_the_golden_text(golden: Callable[[str, str], None]) -> None:
    golden("fuse_tables", str(compiled(fields(), inputs(64), FUSE).program))
