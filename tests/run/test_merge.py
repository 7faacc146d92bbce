"""merge: constant folding on maps."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lrc_passes.merge import Merge
from torch import Tensor

from lrc.errors import SiteError, UsageError
from lrc.maps import Chain, Dense, Diagonal, LinearMap, Permutation, Scale, Sum
from lrc.program import Program
from lrc.run import Plan, Session
from lrc.run.pipeline import make_plan, run_passes

MakeSession = Callable[..., Session]
OUT, IN = 16, 20  # the shape of the site `middle`


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def low_rank(rank: int, seed: int) -> Chain:
    return Chain(matrix(OUT, rank, seed), matrix(rank, IN, seed + 1))


MAPS: dict[str, Callable[[], LinearMap]] = {
    "a nested chain": lambda: Chain(Chain(matrix(OUT, 3, 1), matrix(3, 5, 2)), matrix(5, IN, 3), bias=vector(OUT, 4)),
    "a middle factor": lambda: Chain(matrix(OUT, 5, 1), matrix(5, 5, 2), matrix(5, IN, 3)),
    "two products of low rank": lambda: Sum(low_rank(3, 1), low_rank(4, 3), bias=vector(OUT, 5)),
    "a constant": lambda: Scale(low_rank(3, 1), 0.5),
    "a weight and a branch": lambda: Sum(Dense(matrix(OUT, IN, 1)), Scale(low_rank(3, 2), 2.0)),
    "a diagonal": lambda: Chain(Diagonal(vector(OUT, 1)), matrix(OUT, IN, 2)),
    "an order that is none": lambda: Chain(matrix(OUT, IN, 1), Permutation(torch.arange(IN))),
    "an order": lambda: Chain(matrix(OUT, IN, 1), Permutation(torch.arange(IN).flip(0))),
    "one dense weight": lambda: Dense(matrix(OUT, IN, 1), vector(OUT, 2)),
    "a product of low rank": lambda: low_rank(3, 1),
}
every_map = pytest.mark.parametrize("name", MAPS)


def program_with(made: LinearMap) -> Program:
    """The perceptron with a map at `middle`."""
    program = tiny.captured_mlp().clone()
    program.replace("middle", made, "test")
    return program


def merged(program: Program, session: Session, **options: Any) -> Plan:
    return run_passes(program, [Merge(targets=["middle"], **options)], session)


def tolerance(made: LinearMap, y: Tensor) -> float:
    """Folding rounds every entry of a product once more: 8 eps a factor, of the largest output."""
    return 8 * 4 * torch.finfo(torch.float32).eps * max(1.0, float(y.abs().max()))


def test_the_merged_graph_reads_as_the_golden_text(session: MakeSession, golden: Callable[[str, str], None]) -> None:
    program = program_with(MAPS["a nested chain"]())
    golden("merge_before", str(program))
    merged(program, session())
    golden("merge_after", str(program))
    merged(program, session(), dense=True)
    golden("merge_dense", str(program))


@every_map
@pytest.mark.parametrize("dense", [False, True])
def test_merging_keeps_the_output(name: str, dense: bool, session: MakeSession) -> None:
    made, x = MAPS[name](), torch.randn(7, IN, generator=torch.Generator().manual_seed(9))
    program = program_with(made)
    merged(program, session(), dense=dense)
    y = made(x).detach()
    difference = (program.map_of("middle")(x) - y).detach().abs().max()
    assert float(difference) <= tolerance(made, y)


@every_map
def test_merging_never_makes_a_layer_larger_or_slower(name: str, session: MakeSession) -> None:
    plan = merged(program_with(MAPS[name]()), session())
    (decision,) = plan.decisions
    assert decision.after.parameters <= decision.before.parameters
    assert decision.after.flops <= decision.before.flops
    assert decision.after.bytes <= decision.before.bytes


@every_map
@pytest.mark.parametrize("dense", [False, True])
def test_a_second_run_changes_nothing(name: str, dense: bool, session: MakeSession) -> None:
    program = program_with(MAPS[name]())
    merged(program, session(), dense=dense)
    once, map_once = str(program), program.map_of("middle")
    again = merged(program, session(), dense=dense)
    assert all(d.keep for d in again.decisions)
    assert str(program) == once
    assert program.map_of("middle") is map_once


def test_what_was_folded_is_in_the_plan(session: MakeSession) -> None:
    plan = merged(program_with(MAPS["two products of low rank"]()), session())
    (decision,) = plan.decisions
    assert decision.notes == (
        "join low rank terms: Sum(Chain[16,3,20], Chain[16,4,20]) -> Sum(Chain[16,7,20])",
        "unwrap single: Sum(Chain[16,7,20]) -> Chain[16,7,20]",
    )
    assert decision.after.parameters == 7 * (OUT + IN) + OUT


def test_dense_folds_even_where_that_is_larger_and_says_so(session: MakeSession) -> None:
    program = program_with(MAPS["a product of low rank"]())
    plan = merged(program, session(), dense=True)
    assert isinstance(program.map_of("middle"), Dense)
    assert plan.decisions[0].notes == (f"folded to one dense weight, {3 * (OUT + IN)} -> {OUT * IN} numbers",)


def test_a_dense_weight_is_kept_with_the_reason(session: MakeSession) -> None:
    for dense, reason in ((False, "nothing to fold"), (True, "nothing to fold: the map is one dense weight")):
        plan = merged(tiny.captured_mlp().clone(), session(), dense=dense)
        assert [d.keep for d in plan.decisions] == [reason]


def test_planning_a_merge_changes_nothing_and_foresees_it(session: MakeSession) -> None:
    program = program_with(MAPS["a nested chain"]())
    before = str(program)
    planned = make_plan(program, [Merge(targets=["middle"])], session())
    assert str(program) == before
    assert planned.to_json() == merged(program, session()).to_json()


def test_a_map_without_a_dense_form_is_refused_by_name(session: MakeSession) -> None:
    class Opaque(LinearMap):
        word = "opaque"

        def __init__(self) -> None:
            super().__init__()
            self.out_features, self.in_features, self.bias = OUT, IN, None
            self.weight = torch.nn.Parameter(matrix(OUT, IN, 1))

        def forward(self, x: Tensor, **context: Any) -> Tensor:
            return torch.relu(x @ self.weight.T)

        def cost(self, tokens: int = 1) -> Any:
            return Dense(self.weight).cost(tokens)

    wanted = "middle: pass `merge` failed: Opaque has no dense form"
    with pytest.raises(SiteError, match=wanted):
        merged(program_with(Opaque()), session(), dense=True)


def test_a_pattern_that_matches_nothing_is_an_error_unless_it_is_optional(session: MakeSession) -> None:
    program = tiny.captured_mlp().clone()
    with pytest.raises(UsageError, match="pattern 'nowhere' matches no site"):
        run_passes(program, [Merge(targets=["nowhere"])], session())
    assert run_passes(program, [Merge(targets=["nowhere"], optional=True)], session()).decisions == ()
