"""What shapes and the spec alone show to be impossible is refused before anything is measured or decomposed."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny

import lrc
from lrc.errors import UsageError
from lrc.run.session import Session

Compile = Callable[..., lrc.Compiled]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be measured")

    for name in ("decompose", "moments", "solve", "measured_key"):
        monkeypatch.setattr(Session, name, refuse)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (
            {"params_kept": 0.05},
            {},
            r"rank\.params_kept: expected at least 0\.1\d* \(the smallest ranks",
        ),
        ({"params_kept": 0.3}, {"round_to": 8}, r"rank\.params_kept: expected at least"),
        ({"size_mb": 0.0002}, {}, r"rank\.size_mb: expected at least 0\.000\d+"),
        ({"flops_kept": 0.02}, {}, r"rank\.flops_kept: expected at least"),
    ],
)
def test_a_budget_below_the_smallest_ranks(rank: Any, options: dict[str, Any], message: str, compiled: Compile) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        compiled(solver="kfac", rank=rank, **options)
    assert caught.value.exit_code == 2


def test_the_least_budget_that_is_named_is_met(compiled: Compile) -> None:
    for key in ("params_kept", "flops_kept"):
        for solver in ("svd", "kfac"):
            with pytest.raises(UsageError) as caught:
                compiled(solver=solver, rank={key: 0.01})
            least = float(caught.value.expected.split()[2])
            if solver == "svd":
                assert compiled(solver=solver, rank={key: least}).plan.parameters[1] > 0


@pytest.mark.usefixtures("unmeasured")
def test_allocators_that_look_at_runs_need_data() -> None:
    for allocate in ("block_influence", "sensitivity_bisect"):
        with pytest.raises(UsageError, match=f"passes.0.allocate: `{allocate}` looks at the model's runs"):
            lrc.compile(
                tiny.captured_mlp(),
                tiny.factorize(rank={"params_kept": 0.5}, allocate=allocate),
                inputs={"x": tiny.mlp_inputs()},
            )


@pytest.mark.usefixtures("unmeasured")
def test_a_sweep_that_cannot_be_made() -> None:
    spec = tiny.factorize(rank={"params_kept": 0.5})
    for pareto, message in (
        ({"budgets": [0.5, 2.0]}, r"pareto\.budgets: params_kept: .*, got 2"),
        ({"budgets": [0.5], "metric": "accuracy"}, r"evaluate\.accuracy: no data"),
    ):
        with pytest.raises(UsageError, match=message):
            lrc.plan(tiny.captured_mlp(), {**spec, "pareto": pareto}, inputs={"x": tiny.mlp_inputs()})
