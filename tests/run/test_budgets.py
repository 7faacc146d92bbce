"""Budgets of a spec on tiny models: what they promise is what the finished model has."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models import Captured
from safetensors.torch import load_file
from torch import Tensor, nn

import lrc
from lrc.api import compile_to_folder
from lrc.errors import UsageError
from lrc.maps import Chain
from lrc.measure.workload import Workload, rows_per_sample, samples_in, shapes_at, shapes_per_use, typical
from lrc.program import Program
from lrc.run.flops import count_flops
from lrc.solvers import Refusal

Compile = Callable[..., lrc.Compiled]
ROWS, LENGTH = 6, 9


class Reader(nn.Module):
    """Tokens, a weight that is used twice, and a pooler that sees one row a sample; none of the linears has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(24, 24, bias=False)
        self.twice = nn.Linear(24, 24, bias=False)
        self.pooler = nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.tokens(x))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.pooler(h.mean(1))


def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


def reader_inputs(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, 24, generator=torch.Generator().manual_seed(seed))}


def compile_reader(tmp_path: Path, **options: Any) -> lrc.Compiled:
    spec = tiny.factorize(**({"solver": "kfac"} | options))
    batches = [reader_inputs(seed=seed) for seed in range(6)]
    return lrc.compile(reader(), spec, inputs=reader_inputs(), calibration=batches, cache=tmp_path / "cache")


def flops(program: Program) -> int:
    return count_flops(program, reader_inputs())


# Rows.


def test_rows_are_counted_for_every_site_and_use() -> None:
    program = lrc.capture(reader(), reader_inputs())
    shapes = shapes_at(program, [reader_inputs(), reader_inputs(2)], Workload())
    assert [samples_in(program, of_batch) for of_batch in shapes] == [ROWS, 2]
    assert [shape[:-1] for shape in shapes_per_use(program, program.sites["tokens"], shapes[0])] == [(ROWS, LENGTH)]
    assert [shape[:-1] for shape in shapes_per_use(program, program.sites["twice"], shapes[1])] == [(2, LENGTH)] * 2
    found = {fqn: rows_per_sample(program, site, shapes) for fqn, site in program.sites.items()}
    assert found == {"tokens": LENGTH, "twice": 2 * LENGTH, "pooler": 1}
    assert typical(shapes) == shapes[0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert"])
def test_rows_are_those_that_a_run_sees(name: str, captured: Callable[[str], Captured]) -> None:
    program = captured(name).program
    batch = {key: value[:1].expand(3, -1)[:, :5] for key, value in program.inputs.examples.items()}
    (shapes,) = shapes_at(program, [batch], Workload())
    seen: dict[str, tuple[int, ...]] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Watch(program.graph_module).run(*program.inputs.fill(batch).values())
    for site in program.sites.values():
        assert shapes_per_use(program, site, shapes) == tuple(seen[use.input] for use in site.uses)


def test_shapes_that_are_asked_for_take_the_place_of_the_calibration(captured: Callable[[str], Captured]) -> None:
    program = captured("bert").program
    (shapes,) = shapes_at(program, [program.inputs.examples], Workload(batch=3, length=17))
    assert set(shapes.values()) == {(3, 17)}
    with pytest.raises(UsageError, match=r"at\.length: expected at most 20, the model's largest, got 21"):
        shapes_at(program, [program.inputs.examples], Workload(length=21))
    perceptron = tiny.captured_mlp()
    with pytest.raises(UsageError, match=r"at\.length: the captured graph has no dynamic sequence"):
        shapes_at(perceptron, [perceptron.inputs.examples], Workload(length=4))


# FLOPs.


@pytest.mark.parametrize("form", ["two_factor", "pivoted", "auto"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_the_flops_of_the_result_are_within_the_budget_and_use_it(kept: float, form: str, tmp_path: Path) -> None:
    done = compile_reader(tmp_path, rank={"flops_kept": kept}, form=form, solver={"type": "kfac", "center": False})
    before, after = flops(done.dense), flops(done.program)
    step = 2 * ROWS * LENGTH * 2 * (24 + 24)  # one rank of the weight that is used twice
    assert kept * before - step < after <= kept * before
    assert (
        f"FLOPs of the targets: {before / ROWS:.4g} → {after / ROWS:.4g} per sample ({after / before:.1%} kept)" in done.report
    )


def test_shapes_that_the_model_does_not_take_are_refused_before_anything_is_decomposed(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.run.session.Session.decompose", lambda *_: pytest.fail("decomposed"))
    with pytest.raises(UsageError, match=r"at\.length: the captured graph has no dynamic sequence") as caught:
        compiled(rank={"flops_kept": 0.5}, at={"length": 8})
    assert caught.value.exit_code == 2


def test_a_pooler_that_sees_one_row_keeps_more_where_flops_count_and_a_weight_used_twice_less(tmp_path: Path) -> None:
    plans = [compile_reader(tmp_path, rank=rank).plan for rank in ({"flops_kept": 0.5}, {"params_kept": 0.5})]
    by_flops, by_number = ({d.name: d.after.parameters for d in plan.decisions} for plan in plans)
    assert by_flops["pooler"] > by_number["pooler"]
    assert by_flops["twice"] < by_number["twice"]


def test_flops_need_no_calibration_data() -> None:
    done = lrc.compile(reader(), tiny.factorize(rank={"flops_kept": 0.5}, allocate="uniform"), inputs=reader_inputs())
    assert flops(done.program) <= 0.5 * flops(done.dense)


# Sizes.


@pytest.mark.parametrize("form", ["two_factor", "auto"])
@pytest.mark.parametrize("solver", ["svd", "kfac"])
def test_the_whole_model_stays_within_its_size(solver: str, form: str, compiled: Compile) -> None:
    most = 4 * (240 + 20 + 320 + 160 + 10)
    for size in (0.5 * most, 0.8 * most, most):
        done = compiled(solver=solver, rank={"size_mb": size / 1e6}, form=form)
        assert done.plan.bytes[1] == done.program.size()[1] <= size
        assert done.plan.bytes[1] > size - 4 * (20 + 20) * (1 if solver == "kfac" else 3)


def test_a_size_counts_everything_that_is_no_target(compiled: Compile) -> None:
    everything = 4 * (240 + 20 + 320 + 160 + 10)
    done = compiled(targets=["up"], rank={"size_mb": (everything - 200) / 1e6}, form="two_factor")
    assert everything - 400 < done.program.size()[1] <= everything - 200
    assert done.program.maps.keys() == {"up"}


def test_the_folder_is_no_larger_than_its_size(llama: Path, data: Path, checked_here: None, tmp_path: Path) -> None:
    spec = tiny.factorize(targets=[tiny.LAYERS], solver="kfac", rank={"size_mb": 0.04}) | {
        "calibration": {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 12}
    }
    done = compile_to_folder(str(llama), spec, output=tmp_path / "out")
    done.raise_on_failure()
    assert done.record.plan.bytes[1] <= 40_000 < done.record.plan.bytes[0]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 40_000


def test_a_tied_head_that_would_only_add_bytes_stays(tmp_path: Path) -> None:
    model, ids = (
        nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 30, bias=False)).eval(),
        {"input": torch.arange(20).reshape(2, 10)},
    )
    model[2].weight = model[0].weight
    spec = tiny.factorize(rank={"size_mb": 1900e-6}, tied="untie", form="two_factor")
    done = lrc.compile(model, spec, inputs=ids)
    assert done.program.size()[1] <= 1900
    assert {d.name: d.rank is None for d in done.plan.decisions} == {"1": False, "2": True}


@pytest.mark.parametrize("round_to", [1, 2])
def test_two_factors_in_place_of_an_unstable_pivoted_form_take_no_more(
    round_to: int, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("lrc_passes.factorize")
    monkeypatch.setattr(module, "pivot", lambda *_, **__: Refusal("the test says so"))
    done = compiled(solver={"type": "kfac", "modules": False}, rank={"size_mb": 0.0022}, round_to=round_to)
    assert done.program.size()[1] <= 2200
    found = [d for d in done.plan.decisions if d.rank is not None]
    assert {type(done.program.map_of(d.name)) for d in found} == {Chain}
    assert all(d.rank % round_to == 0 and f",{d.rank}," in d.after.text for d in found if d.rank)
    assert any("two factors in place of the pivoted form: the test says so" in d.notes for d in found)


def test_a_size_that_the_rest_of_the_model_takes_alone_is_refused_with_the_least(compiled: Compile) -> None:
    with pytest.raises(UsageError, match=r"rank\.size_mb: expected at least 0\.000496 .*, got 0\.0001") as caught:
        compiled(rank={"size_mb": 0.0001}, form="two_factor")
    assert caught.value.exit_code == 2
    least = float(caught.value.expected.split()[2])
    assert compiled(rank={"size_mb": least}, form="two_factor").program.size()[1] <= 1e6 * least


def test_the_command_refuses_an_impossible_budget_with_exit_code_2(cli: tiny.Run, spec: Path, bert: Path) -> None:
    answer = cli("plan", spec, bert, "passes.0.rank={size_mb: 0.001}")
    assert answer.code == 2
    assert "rank.size_mb: expected at least 0.0" in answer.error


# Allocators.


@pytest.mark.parametrize("rank", [{"params_kept": 0.5}, {"size_mb": 0.002}, {"flops_kept": 0.5}])
def test_exact_predicts_no_more_loss_than_global_and_global_no_more_than_uniform(rank: Any, compiled: Compile) -> None:
    done = {name: compiled(solver="kfac", rank=rank, allocate=name) for name in ("exact", "global", "uniform")}
    losses = {name: sum(d.predicted or 0 for d in made.plan.decisions) for name, made in done.items()}
    assert losses["exact"] <= losses["global"] <= losses["uniform"]
    assert "exact allocation: solved, within 0.00% of the least loss on its grid" in done["exact"].report


def test_shares_by_the_inverse_logarithm_stay_within_the_budget(llama: Path, data: Path, in_tmp: Path) -> None:
    spec = tiny.factorize(
        targets=[tiny.LAYERS], solver="whitened", rank={"params_kept": 0.5}, allocate="loss_log_inverse", form="two_factor"
    ) | {"calibration": {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 12}}
    plan = lrc.compile(str(llama), spec).plan
    before, after = (sum(getattr(d, side).parameters for d in plan.decisions) for side in ("before", "after"))
    assert 0.3 * before < after <= 0.5 * before
