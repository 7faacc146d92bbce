"""Solvers as a spec names them: what is measured for them, at which rank they solve, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lrc_passes.factorize import Factorize
from torch import Tensor, nn

import lrc
from lrc.data import batches_of
from lrc.errors import SolverError, SpecError
from lrc.maps import Chain
from lrc.measure import collect
from lrc.measure.second_moments import SecondMoment
from lrc.run import Session
from lrc.run.pipeline import make_plan, predicted_memory, run_passes
from lrc.run.session import max_rank, settled
from lrc.solvers import Need
from lrc.solvers.scaled import SHIFT

Compile = Callable[..., lrc.Compiled]
MakeSession = Callable[..., Session]
scaled = pytest.mark.parametrize("solver", ["asvd", "fwsvd"])
not_nested = pytest.mark.parametrize("solver", ["snmf", "nmf", "random"])


def non_negative() -> nn.Module:
    """The perceptron with weights that NMF takes too."""
    model = tiny.mlp()
    with torch.no_grad():
        for name in ("up", "middle", "down"):
            model.get_parameter(f"{name}.weight").abs_()
    return model


def factors(done: lrc.Compiled, name: str) -> tuple[Tensor, Tensor]:
    made = done.program.map_of(name)
    assert isinstance(made, Chain)
    B, A = made.slots
    assert isinstance(B, Tensor)
    assert isinstance(A, Tensor)
    return B.detach(), A.detach()


def options(solver: Any, rank: Any, **more: Any) -> Factorize:
    return Factorize.model_validate({"solver": solver, "rank": rank, "form": "two_factor", **more})


# Scaled by magnitudes and by Fisher information.


@scaled
@pytest.mark.parametrize("form", ["two_factor", "pivoted"])
def test_the_rank_of_a_deficient_weight_reproduces_the_model(solver: str, form: str, compiled: Compile) -> None:
    model, x = tiny.mlp(3), tiny.mlp_inputs(64, seed=9)
    with torch.no_grad():
        for layer in (model.up, model.middle, model.down):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U[:, :4] * S[:4] @ Vh[:4])
        done = compiled(model, solver=solver, rank=4, form=form)
        assert {d.rank for d in done.plan.decisions} == {4}
        error = (done.module(x) - model(x)).abs().max()
        assert error <= 3 * 8 * torch.finfo(x.dtype).eps * float(model(x).abs().max())


def test_the_predicted_loss_of_asvd_is_the_measured_one(compiled: Compile) -> None:
    model = tiny.mlp()
    done = compiled(model, targets=["up"], solver={"type": "asvd", "alpha": 0.7}, rank=4, form="two_factor")
    magnitudes = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()]).double().abs().mean(0)
    W, made = model.up.weight.detach().double(), done.program.map_of("up").exact().weight
    error = float(((W - made) * (magnitudes**0.7 + SHIFT)).square().sum())
    (decision,) = done.plan.decisions
    assert decision.predicted == pytest.approx(error, rel=1e-5)
    assert decision.unit == "squared weight error scaled by input magnitudes"


def test_the_predicted_loss_of_fwsvd_is_the_measured_one(compiled: Compile) -> None:
    model = nn.Linear(12, 20).eval()
    x = tiny.mlp_inputs(32)
    done = compiled(
        model, inputs=(x,), calibration=[(x,)], solver={"type": "fwsvd", "fisher": "outputs"}, rank=4, form="two_factor"
    )
    sent = torch.randn(32, 20, generator=torch.Generator().manual_seed(0)).double()  # of the first batch and the seed 0
    fisher = sent.square().T @ x.double().square() / 32
    (decision,) = done.plan.decisions
    W, made = model.weight.detach().double(), done.program.map_of(decision.name).exact().weight
    error = float(((W - made) * fisher.sum(0).sqrt()).square().sum())
    assert decision.predicted == pytest.approx(error, rel=1e-5)
    assert decision.unit == "squared weight error scaled by Fisher information"


@scaled
def test_a_budget_is_shared_equally_because_losses_are_in_units_of_their_layers(solver: str, compiled: Compile) -> None:
    auto, uniform = (compiled(solver=solver, rank={"params_kept": 0.6}, allocate=way) for way in ("auto", "uniform"))
    assert [d.rank for d in auto.plan.decisions] == [d.rank for d in uniform.plan.decisions]


@scaled
def test_only_what_the_solver_asks_for_is_measured(solver: str, compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecondMoment, "add", lambda *_: pytest.fail("a second moment was measured"))
    assert {d.rank for d in compiled(solver=solver, rank=3).plan.decisions} == {3}


def test_what_is_measured_is_found_again_by_what_it_depends_on(session: MakeSession) -> None:
    program, made = tiny.captured_mlp(), session()
    needs = [frozenset({need}) for need in Need]
    keys = [made.measured_key(program, need) for need in needs]
    assert len(set(keys)) == len(needs)
    kinds = [settled(program, options({"type": "fwsvd", "fisher": kind}, 3)).solver for kind in ("labels", "outputs", "auto")]
    labels, outputs, auto = (made.measured_key(program, kind.needs, kind) for kind in kinds)
    assert labels != outputs == auto  # a model without logits
    asvd = [options({"type": "asvd", "alpha": alpha}, 3).solver for alpha in (0.3, 0.5)]
    assert made.measured_key(program, asvd[0].needs, asvd[0]) == made.measured_key(program, asvd[1].needs, asvd[1])


def test_the_weight_fisher_counts_in_the_predicted_memory(session: MakeSession) -> None:
    program, made = tiny.captured_mlp(), session()
    memory = {}
    for solver in ("svd", "fwsvd"):
        plan = make_plan(program, [options(solver, 3)], made)
        memory[solver] = predicted_memory(program, [options(solver, 3)], plan, made)
    assert memory["fwsvd"] - memory["svd"] == 8 * sum(m * n for m, n in ((20, 12), (16, 20), (10, 16)))


# Not nested in rank.


@not_nested
@pytest.mark.parametrize(
    ("rank", "round_to", "wanted"),
    [
        (4, 1, (4, 4, 4)),
        (5, 3, (3, 3, 3)),
        ({"fraction": 0.34}, 1, (4, 5, 3)),  # of 12, 16, 10
        ({"breakeven": 0.5}, 1, (3, 4, 3)),  # of 7.5, 8.9, 6.2
        ({"breakeven": 0.5}, 2, (2, 4, 2)),
    ],
)
def test_a_weight_is_solved_at_exactly_the_rank_that_its_shape_gives(
    solver: str, rank: Any, round_to: int, wanted: tuple[int, ...], compiled: Compile
) -> None:
    model = non_negative()
    done = compiled(model, solver=solver, rank=rank, round_to=round_to, form="two_factor")
    assert tuple(d.rank for d in done.plan.decisions) == wanted
    asked = [max_rank(done.program.sites[name], options(solver, rank, round_to=round_to)) for name in ("up", "middle", "down")]
    assert tuple(asked) == wanted
    for decision in done.plan.decisions:
        B, A = factors(done, decision.name)
        W = model.get_parameter(f"{decision.name}.weight").detach().double()
        assert B.shape[1] == A.shape[0] == decision.rank
        assert decision.predicted == pytest.approx(float((W - B.double() @ A.double()).square().sum()), rel=1e-5)
        assert decision.unit == "squared weight error"


def test_the_second_factor_of_snmf_has_no_negative_entry_and_the_bias_is_kept(compiled: Compile) -> None:
    model = tiny.mlp()
    done = compiled(model, solver={"type": "snmf", "num_iter": 50}, rank=4, form="two_factor")
    for name in ("up", "middle", "down"):
        assert float(factors(done, name)[0].min()) >= 0
    assert torch.equal(done.program.map_of("up").bias, model.up.bias)


def test_random_factors_discard_weight_and_bias_and_say_so(compiled: Compile) -> None:
    done = [compiled(tiny.mlp(seed), solver="random", rank=4, form="two_factor") for seed in (0, 1)]
    for name, biased in (("up", True), ("middle", False), ("down", True)):
        one, other = (each.program.map_of(name) for each in done)
        assert torch.equal(one.exact().weight, other.exact().weight)  # whatever the trained weight was
        assert (one.bias is not None) == biased
        if biased:
            assert torch.equal(one.bias, other.bias)
            assert not torch.equal(one.bias, tiny.mlp().get_parameter(f"{name}.bias"))
    for decision in done[0].plan.decisions:
        (note,) = decision.notes
        assert "what the layer has learned, its bias included, is discarded" in note


def test_another_seed_is_another_start_though_a_cache_is_there(session: MakeSession) -> None:
    starts = []
    for seed in (0, 0, 1):
        program = tiny.captured_mlp().clone()
        run_passes(program, [options("random", 4)], session(seed=seed))
        starts.append(program.map_of("up").exact().weight)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@not_nested
def test_a_rank_that_does_not_shrink_a_layer_leaves_it_dense(solver: str, compiled: Compile) -> None:
    done = compiled(non_negative(), solver=solver, rank=8, form="two_factor")
    assert [d.rank for d in done.plan.decisions] == [None, 8, None]


# Refusals.


@not_nested
@pytest.mark.parametrize("rank", [{"params_kept": 0.5}, {"energy": 0.9}])
def test_a_rank_that_is_chosen_by_losses_is_refused_with_the_way_out(solver: str, rank: Any, compiled: Compile) -> None:
    (policy,) = rank
    wanted = (
        rf"^spec: passes\.0: the solver `{solver}` decomposes anew for every rank, so `rank: {{{policy}: …}}` has nothing to "
        r"choose from; give a whole number, \{fraction: …\} or \{breakeven: …\}, or choose another solver\.$"
    )
    with pytest.raises(SpecError, match=wanted) as caught:
        compiled(solver=solver, rank=rank)
    assert caught.value.exit_code == 2


def test_nmf_names_the_layer_whose_weight_has_negative_entries(compiled: Compile) -> None:
    model = non_negative()
    with torch.no_grad():
        model.get_parameter("middle.weight")[2, 3] = -0.5
    wanted = r"^middle: weight: expected no negative entry, got 1 negative of 320 values\. Choose the solver `snmf`"
    with pytest.raises(SolverError, match=wanted):
        compiled(model, solver="nmf", rank=4)


# A weight for every entry.


def test_altmin_weighs_entries_by_their_fisher_information(compiled: Compile) -> None:
    needs = frozenset({Need.WEIGHT_FISHER})
    program = lrc.capture(tiny.mlp(), {"x": tiny.mlp_inputs()})
    items = tiny.calibration_of_mlp()
    fisher = collect(program, batches_of(items, list(items[0])), ["middle"], needs)["middle"].weight_fisher
    errors = {}
    for solver in ({"type": "altmin", "weights": "fisher"}, "svd"):
        done = compiled(solver=solver, rank=4, form="two_factor")
        assert {d.rank for d in done.plan.decisions} == {4}
        change = done.program.map_of("middle").exact().weight - program.map_of("middle").exact().weight
        errors[str(solver)] = float((fisher * change.square()).sum())
    least, plain = errors.values()
    assert least < 0.9 * plain


def test_altmin_refuses_a_budget(compiled: Compile) -> None:
    with pytest.raises(SpecError, match="altmin"):
        compiled(solver={"type": "altmin", "weights": "none"}, rank={"params_kept": 0.5})
