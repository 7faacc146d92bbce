"""prune, method ranks: components of products are dropped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lrc_passes.pruners.ranks import components, suffix_losses
from torch import Tensor, nn

import lrc
from lrc.errors import SolverError, SpecError
from lrc.maps import Chain, Conv, Dense, Gate, Geometry, LinearMap, Lookup, Scale, Sum, frozen_base
from lrc.program import Program
from lrc.run import Keep

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def program_of(*maps: LinearMap) -> Program:
    """Linears behind each other, with these maps in their places."""
    model = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in maps)).eval()
    program = lrc.capture(model, {"input": X[:, : maps[0].in_features]})
    for fqn, made in zip(list(program.sites), maps, strict=True):
        program.replace(fqn, made, "factorize")
    return program


def assert_unchanged(found: Tensor, exact: Tensor) -> None:
    """Outputs are the same to 1e-6 of the largest."""
    assert float((found - exact).abs().max().detach()) <= 1e-6 * float(exact.abs().max().detach())


def pruned(program: Program, *more: Any, **method: Any) -> lrc.Compiled:
    passes = [{"type": "prune", "method": {"type": "ranks", **method}}, *more]
    return lrc.compile(program, {"version": 1, "passes": passes}, inputs={"input": X[:, :24]}, cache="cache")


def gated(gate: list[float], m: int = 16, n: int = 24) -> Sum:
    """A frozen weight and a branch of SoRA."""
    k = len(gate)
    branch = Scale(Chain(randn(m, k, seed=1), Gate(torch.tensor(gate)), randn(k, n, seed=2)), 2.0)
    base = frozen_base(Dense(randn(m, n, seed=3)))
    return Sum(base, branch, bias=randn(m, seed=4), names=("base", "adapter"))


def test_gates_at_zero_go_without_a_trace_and_merging_afterwards_changes_nothing() -> None:
    made = gated([0.3, 0.0, -0.5, 0.0, 0.1])
    exact = made(X).detach()
    done = pruned(program_of(made))
    (decision,) = done.plan.decisions
    assert decision.rank == 3
    assert decision.notes == ("3 of 5 components stay: error 0.00% of the product",)
    assert decision.after.bytes == decision.before.bytes - 2 * (16 + 24 + 1) * 4
    assert_unchanged(done.module(X), exact)
    merged = pruned(program_of(made), {"type": "merge"})
    assert_unchanged(merged.module(X), exact)
    assert repr(merged.program.sites["0"].map).startswith("Dense[16,24]")
    trained = {name for name, p in done.program.sites["0"].map.named_parameters() if p.requires_grad}
    assert trained == {"bias", "adapter.inner.B", "adapter.inner.R.diagonal", "adapter.inner.A"}


def test_a_branch_whose_gates_are_all_closed_leaves_the_frozen_weight() -> None:
    made = gated([0.0, 0.0])
    done = pruned(program_of(made))
    assert repr(done.program.sites["0"].map) == "Dense[16,24]"
    assert_unchanged(done.module(X), made(X))


def test_the_smallest_gates_go_and_one_stays_where_nothing_else_stands() -> None:
    made = Chain(randn(16, 4, seed=1), Gate(torch.tensor([0.1, -0.9, 0.0, 0.4])), randn(4, 24, seed=2))
    done = pruned(program_of(made), rank=2)
    new = done.program.sites["0"].map
    assert isinstance(new, Chain)
    assert new.R.diagonal.tolist() == pytest.approx([-0.9, 0.4])
    assert torch.equal(new.B, made.B[:, [1, 3]])
    assert torch.equal(new.A, made.A[[1, 3]])
    none = Chain(randn(16, 2, seed=1), Gate(torch.zeros(2)), randn(2, 24, seed=2))
    assert pruned(program_of(none)).plan.decisions[0].rank == 1


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_singular_directions_are_cut_as_the_truncated_svd_cuts_them(rank: int) -> None:
    made = Chain(randn(16, 8, seed=1), randn(8, 24, seed=2), bias=randn(16, seed=3))
    done = pruned(program_of(made), criterion="singular", rank=rank)
    W = made.dense().weight.double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(done.program.sites["0"].map.dense().weight.double(), (U[:, :rank] * S[:rank]) @ Vh[:rank],
                               atol=1e-5, rtol=1e-5)  # fmt: skip
    share = float((S[rank:].square().sum() / S.square().sum()).sqrt())
    assert done.plan.decisions[0].notes == (f"{rank} of 8 components stay: error {share:.2%} of the product",)
    assert repr(done.program.sites["0"].map) == f"Chain[16,{rank},24]"


def test_the_order_of_maestro_keeps_the_first_components() -> None:
    made = Chain(randn(16, 8, seed=1), randn(8, 24, seed=2))
    done = pruned(program_of(made), criterion="order", rank={"fraction": 0.25})
    new = done.program.sites["0"].map
    assert isinstance(new, Chain)
    assert torch.equal(new.B, made.B[:, :4])
    assert torch.equal(new.A, made.A[:4])
    assert (torch.linalg.matrix_norm((made.dense().weight - new.dense().weight).double()) ** 2).item() == pytest.approx(
        float(components(made, "order").losses[4]), rel=1e-5  # type: ignore[union-attr]  # there are some
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["params_kept", "flops_kept"])
def test_one_budget_over_all_products_is_never_exceeded_and_goes_where_it_loses_least(policy: str) -> None:
    weak = Chain(0.01 * randn(24, 8, seed=1), randn(8, 24, seed=2))
    strong = Chain(randn(16, 8, seed=3), randn(8, 24, seed=4), bias=torch.zeros(16))
    done = pruned(program_of(weak, strong), criterion="singular", rank={policy: 0.5})
    ranks = [d.rank for d in done.plan.decisions]
    kept = sum((8 if r is None else r) * size for r, size in zip(ranks, (48, 40), strict=True))
    assert kept <= 0.5 * 8 * 88
    assert kept > 0.5 * 8 * 88 - 48
    assert (ranks[1] or 8) > (ranks[0] or 8)


def test_the_loss_of_a_cut_is_the_error_of_the_weight() -> None:
    B, A = randn(9, 5, seed=1).double(), randn(5, 7, seed=2).double()
    losses = suffix_losses(B, A)
    assert losses[5] == 0
    assert bool((losses.diff() <= 0).all())
    assert losses[0] >= torch.linalg.matrix_norm(B @ A) ** 2 - 1e-9
    assert losses[4] == pytest.approx(float((B[:, 4:] @ A[4:]).square().sum()))


def test_kernels_and_tables_lose_components_too() -> None:
    unit = Geometry.unit(2)
    kernel = Chain(
        Conv(randn(6, 4, 1, 1, seed=1), unit), Gate(torch.tensor([1.0, 0.0, 2.0, 0.0]), spatial=2),
        Conv(randn(4, 3, 3, 3, seed=2), Geometry((1, 1), (1, 1), (1, 1))),
    )  # fmt: skip
    table = Chain(randn(6, 4, seed=1), Gate(torch.tensor([1.0, 0.0, 2.0, 0.0])), Lookup(randn(10, 4, seed=2)))
    for made, x in ((kernel, randn(2, 3, 5, 5)), (table, torch.arange(10))):
        found = components(made, "gates")
        assert not isinstance(found, Keep)
        assert_unchanged(found.first(2)(x), made(x))


@pytest.mark.parametrize(("made", "method", "reason"), [
    (Dense(randn(16, 24)), {}, "no product of two factors"),
    (Chain(randn(16, 4), randn(4, 24)), {}, "no gate"),
    (Chain(randn(16, 4), randn(4, 24)), {"criterion": "order", "rank": 6}, "all 4 components stay"),
    (Sum(Chain(randn(16, 2), randn(2, 24)), Chain(randn(16, 2), randn(2, 24))), {"criterion": "order", "rank": 1}, "several"),
])  # fmt: skip
def test_what_has_no_components_stays_with_the_reason(made: LinearMap, method: dict[str, Any], reason: str) -> None:
    done = pruned(program_of(made), **method)
    assert reason in str(done.plan.decisions[0].keep)


@pytest.mark.parametrize("method", [
    {"criterion": "singular"}, {"criterion": "order"}, {"rank": {"size_mb": 1.0}}, {"criterion": "smallest", "rank": 2},
])  # fmt: skip
def test_amounts_that_say_nothing_are_refused(method: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"passes\.0"):
        pruned(program_of(gated([1.0])), **method)


def test_adapters_stay_adapters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    spec = {"version": 1, "passes": [{"type": "adapt", "method": "sora", "rank": 4, "targets": ["0"]}]}
    program = lrc.compile(model, spec, inputs={"input": X}, cache="cache").program
    gate = next(m for m in program.graph_module.modules() if isinstance(m, Gate))
    gate.diagonal.data.copy_(torch.tensor([0.5, 0.0, 0.2, 0.0]))
    done = pruned(program)
    assert done.program.adapters["0"].rank == 2
    assert done.program.adapters["0"].method == "sora"


@pytest.mark.parametrize("criterion", ["singular", "order"])
def test_factors_that_are_not_finite_are_refused(criterion: str) -> None:
    A = randn(6, 24)
    A[2, 3] = torch.inf
    with pytest.raises(SolverError, match=r"A of Chain.*expected finite numbers, got 0 NaN and 1 infinite"):
        pruned(program_of(Chain(randn(16, 6), A)), criterion=criterion, rank=2)
