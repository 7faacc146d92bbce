"""factorize: a dense weight becomes a product of rank r."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import SiteError, UsageError
from lrc.maps import Chain, Dense, Pivoted

Compile = Callable[..., lrc.Compiled]
SHAPES = {"up": (20, 12), "middle": (16, 20), "down": (10, 16)}


class Tied(nn.Module):
    """A head that shares the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class HalfDead(nn.Module):
    """One linear that only ever sees zeros, and one whose output never matters."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = nn.Linear(12, 20)
        self.blind = nn.Linear(20, 14)
        self.mute = nn.Linear(20, 14)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.alive(x))
        return h[..., :14] + self.blind(h * 0) + self.mute(h) * 0


def kept_of(done: lrc.Compiled) -> Mapping[str, str | None]:
    return {d.name: d.keep for d in done.plan.decisions}


def ranks_of(done: lrc.Compiled) -> Mapping[str, int | None]:
    return {d.name: d.rank for d in done.plan.decisions}


def errors(model: nn.Module, done: lrc.Compiled, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (done.module(x) - model(x)).double()


def rounding(model: nn.Module, x: Tensor) -> float:
    """How far two correct runs may differ: 8 eps of the largest value for each of the three sums."""
    with torch.no_grad():
        return 3 * 8 * torch.finfo(x.dtype).eps * float(model(x).abs().max())


def of_rank(rank: int, seed: int = 3) -> nn.Module:
    """The perceptron with weights of exactly this rank."""
    model = tiny.mlp(seed)
    with torch.no_grad():
        for layer in (model.up, model.middle, model.down):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U[:, :rank] * S[:rank] @ Vh[:rank])
    return model


# The golden texts.


@pytest.mark.parametrize("form", ["two_factor", "pivoted"])
def test_the_rewritten_graph_reads_as_the_golden_text(form: str, compiled: Compile, golden: Callable[[str, str], None]) -> None:
    golden("mlp", str(lrc.capture(tiny.mlp(), {"x": tiny.mlp_inputs()})))
    done = compiled(targets=["up", "down"], rank=3, form=form)
    golden(f"factorize_{form}", str(done.program))


# The numeric properties.


@pytest.mark.parametrize("rank", [{"energy": 1.0}, {"fraction": 1.0}, {"params_kept": 1.0}])
def test_keeping_everything_reproduces_the_model_bit_for_bit(rank: Any, compiled: Compile) -> None:
    model, x = tiny.mlp(), tiny.mlp_inputs(5, seed=9)
    done = compiled(model, rank=rank, form="two_factor")
    assert torch.equal(done.module(x), model(x))
    assert all(kept_of(done).values())


@pytest.mark.parametrize("form", ["two_factor", "pivoted", "auto"])
@pytest.mark.parametrize("solver", ["svd", "kfac", "whitened"])
def test_the_whole_energy_of_a_deficient_weight_reproduces_the_model(solver: str, form: str, compiled: Compile) -> None:
    model, x = of_rank(4), tiny.mlp_inputs(64, seed=9)
    done = compiled(model, solver=solver, rank=4, form=form)
    assert set(ranks_of(done).values()) == {4}
    assert errors(model, done, x).abs().max() <= rounding(model, x)


def test_the_whole_energy_finds_the_rank_of_a_deficient_weight(compiled: Compile) -> None:
    done = compiled(of_rank(4), rank={"energy": 1 - 1e-9}, form="two_factor")
    assert set(ranks_of(done).values()) == {4}


def test_the_error_falls_as_the_rank_grows_and_is_the_predicted_one(compiled: Compile) -> None:
    model = tiny.mlp()
    W = model.middle.weight.detach().double()
    found = []
    for rank in range(1, 9):
        done = compiled(model, targets=["middle"], rank=rank, form="two_factor")
        weight, _ = done.program.map_of("middle").exact()
        found.append(float((W - weight).square().sum()))
        assert done.plan.decisions[0].predicted == pytest.approx(found[-1], rel=1e-5)
        assert found[-1] == pytest.approx(float(torch.linalg.svdvals(W)[rank:].square().sum()), rel=1e-5)
    assert found == sorted(found, reverse=True)


def test_the_predicted_output_error_is_the_one_on_the_calibration_data(compiled: Compile) -> None:
    model = nn.Sequential(nn.Linear(12, 20)).eval()
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    done = compiled(model, calibration=[(x,)], inputs=(tiny.mlp_inputs(),), solver="whitened", rank=4, form="two_factor")
    squared = errors(model, done, x).square().sum(-1).mean()
    assert done.plan.decisions[0].predicted == pytest.approx(float(squared), rel=1e-4)


def test_data_makes_the_output_error_smaller_than_the_weight_alone(compiled: Compile) -> None:
    model = tiny.mlp()
    flat = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    calibration = [{"x": tiny.mlp_inputs(32, seed)[:, :4] @ flat} for seed in range(4)]  # in a subspace
    x = torch.cat([batch["x"] for batch in calibration])
    losses = {
        solver: float(errors(model, compiled(model, calibration=calibration, solver=solver, rank=3), x).square().mean())
        for solver in ("svd", "whitened", "kfac")
    }
    assert losses["whitened"] < 0.5 * losses["svd"]
    assert losses["kfac"] < 0.5 * losses["svd"]


def test_layers_fitted_behind_compressed_ones_give_a_lower_output_error(compiled: Compile) -> None:
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    solver = {"type": "whitened", "blend": 1.0}
    for seed in range(3):
        model = tiny.mlp(seed)
        losses = [
            float(errors(model, compiled(model, solver={**solver, "propagate": way}, rank=3), x).square().mean())
            for way in ("dense", "compressed")
        ]
        assert losses[1] < losses[0]


def test_what_a_site_waits_for_is_in_the_plan(compiled: Compile) -> None:
    done = compiled(solver={"type": "whitened", "propagate": "compressed"}, rank=3)
    assert {d.name: d.after_sites for d in done.plan.decisions} == {"up": (), "middle": ("up",), "down": ("middle",)}


def test_running_twice_equals_once(compiled: Compile) -> None:
    """A product of rank r decomposes into itself: the second pass finds nothing smaller, and keeps every map."""
    options = {"type": "factorize", "solver": "kfac", "rank": 5, "form": "two_factor"}
    x = tiny.mlp_inputs(5, seed=9)
    once = compiled(solver="kfac", rank=5, form="two_factor")
    spec = {"version": 1, "passes": [options, options]}
    twice = lrc.compile(tiny.captured_mlp(), spec, calibration=tiny.calibration_of_mlp())
    assert twice.plan.of_pass(1)[1].keep == "rank 5 needs 720 bytes, what stands there 720 (Chain[16,5,20])"
    assert str(twice.program) == str(once.program)
    assert torch.equal(twice.module(x), once.module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype, compiled: Compile) -> None:
    model = of_rank(4).to(dtype)
    batches = [{"x": batch["x"].to(dtype)} for batch in tiny.calibration_of_mlp()]
    done = compiled(model, calibration=batches, inputs=batches[0], solver="kfac", rank=4)
    assert {t.dtype for t in done.program.tensors().values() if t.is_floating_point()} == {dtype}
    assert set(ranks_of(done).values()) == {4}
    x = batches[1]["x"]
    spread = float(model(x).detach().double().std())
    assert errors(model, done, x).square().mean().sqrt() <= 4 * 3 * torch.finfo(dtype).eps * spread


def test_a_dead_layer_never_fails_and_says_so(compiled: Compile) -> None:
    model, x = HalfDead().eval(), tiny.mlp_inputs(32)
    done = compiled(model, solver="kfac", rank=4)
    notes = {d.name: " ".join(d.notes) for d in done.plan.decisions}
    assert "gram is zero: calibration does not reach this layer" in notes["blind"]
    assert "fisher is zero" in notes["mute"]
    assert notes["alive"] == ""
    assert bool(torch.isfinite(done.module(x)).all())


# Forms and ranks.


def test_the_forms_are_what_they_are_called(compiled: Compile) -> None:
    two, pivoted, auto = (
        compiled(targets=["middle"], rank=5, form=form) for form in ("two_factor", "pivoted", "auto")
    )  # fmt: skip
    assert isinstance(two.program.map_of("middle"), Chain)
    assert isinstance(pivoted.program.map_of("middle"), Pivoted)
    assert isinstance(auto.program.map_of("middle"), Pivoted)
    assert [d.plan.decisions[0].form for d in (two, pivoted, auto)] == ["two_factor", "pivoted", "pivoted"]
    assert two.plan.decisions[0].after.parameters == 5 * (16 + 20)
    assert pivoted.plan.decisions[0].after.parameters == 5 * (16 + 20 - 5)


def test_both_forms_hold_the_same_product(compiled: Compile) -> None:
    weights = [
        compiled(targets=["middle"], rank=5, form=form).program.map_of("middle").exact().weight
        for form in ("two_factor", "pivoted")
    ]
    tolerance = 8 * 20 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(weights[0], 2))
    assert float((weights[0] - weights[1]).abs().max()) <= tolerance


@pytest.mark.parametrize(
    ("rank", "wanted"),
    [
        (4, {"up": 4, "middle": 4, "down": 4}),
        ({"fraction": 0.34}, {"up": 4, "middle": 5, "down": 3}),  # of 12, 16, 10
        ({"breakeven": 0.5}, {"up": 3, "middle": 4, "down": 3}),  # of 7.5, 8.9, 6.2
    ],
)
def test_ranks_are_as_the_spec_says(rank: Any, wanted: Mapping[str, int], compiled: Compile) -> None:
    assert ranks_of(compiled(rank=rank, form="two_factor")) == wanted


def test_an_energy_is_kept_and_no_smaller_rank_keeps_it(compiled: Compile) -> None:
    model = tiny.mlp()
    ranks = ranks_of(compiled(model, rank={"energy": 0.6}, form="pivoted"))
    for name, rank in ranks.items():
        S = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()).square()
        assert rank is not None
        assert float(S[:rank].sum() / S.sum()) >= 0.6 > float(S[: rank - 1].sum() / S.sum())


@pytest.mark.parametrize("form", ["two_factor", "pivoted"])
@pytest.mark.parametrize("solver", ["svd", "kfac"])
@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_the_kept_parameters_stay_within_the_budget_and_use_it(kept: float, solver: str, form: str, compiled: Compile) -> None:
    done = compiled(solver=solver, rank={"params_kept": kept}, form=form)
    before, after = (sum(getattr(d, side).parameters for d in done.plan.decisions) for side in ("before", "after"))
    assert before == sum(m * n for m, n in SHAPES.values()) + 20 + 10
    step = max(m + n for m, n in SHAPES.values()) * (1 if solver == "kfac" else len(SHAPES))
    assert kept * before - step < after <= kept * before


def test_ranks_are_rounded(compiled: Compile) -> None:
    assert ranks_of(compiled(rank={"fraction": 0.45}, round_to=4, form="two_factor")) == {"up": 4, "middle": 4, "down": 4}


def test_a_layer_that_would_not_shrink_stays_dense_with_the_reason(compiled: Compile) -> None:
    done = compiled(rank=8, form="two_factor")
    assert kept_of(done) == {
        "up": "rank 8 needs 256 numbers, the dense weight 240",
        "middle": None,
        "down": "rank 8 needs 208 numbers, the dense weight 160",
    }
    assert isinstance(done.program.map_of("up"), Dense)
    assert "stays dense: rank 8 needs 256 numbers" in done.report


# Which sites.


def test_a_tied_head_is_kept_with_the_reason(compiled: Compile) -> None:
    ids = torch.arange(20).reshape(2, 10)
    done = lrc.compile(Tied(), tiny.factorize(rank=3), inputs={"ids": ids})
    assert kept_of(done) == {
        "body": None,
        "head": "tied: embedding reads the same weight (`tied: untie` gives the linear its own)",
    }


def test_untying_gives_the_head_its_own_weight_and_leaves_the_embedding(compiled: Compile) -> None:
    model, ids = Tied().eval(), torch.arange(20).reshape(2, 10)
    done = lrc.compile(model, tiny.factorize(targets=["head"], rank=3, tied="untie", form="two_factor"), inputs={"ids": ids})
    assert ranks_of(done) == {"head": 3}
    assert done.plan.parameters[1] == done.plan.parameters[0] + 3 * (30 + 12)  # the embedding stays
    grafted = done.graft(model)
    assert torch.equal(grafted.get_parameter("embedding.weight"), model.embedding.weight)
    assert torch.equal(grafted(ids), done.module(ids))
    assert torch.linalg.matrix_rank(grafted(ids)[0].detach()) <= 3


def test_a_tied_head_is_refused_when_asked() -> None:
    with pytest.raises(SiteError, match=r"head: the weight is tied: embedding reads it too\. Set `tied: keep`"):
        lrc.compile(Tied(), tiny.factorize(rank=3, tied="error"), inputs={"ids": torch.arange(20).reshape(2, 10)})


def test_ignored_sites_stay_with_the_pattern(compiled: Compile) -> None:
    done = compiled(rank=3, ignore=["re:mid.*"])
    assert kept_of(done) == {"up": None, "middle": "ignored by 're:mid.*'", "down": None}


def test_the_last_pattern_wins_and_a_shadowed_one_is_noted(compiled: Compile) -> None:
    done = compiled(rank=3, targets=["up", "{up,down}"])
    assert {d.name: d.rule for d in done.plan.decisions} == {"up": "{up,down}", "down": "{up,down}"}
    assert done.plan.shadowed == ("up",)
    assert "pattern 'up' is overruled everywhere by a later one" in done.report


def test_a_pattern_that_matches_nothing_is_an_error_that_names_sites(compiled: Compile) -> None:
    wanted = r"spec: passes\.0: pattern 'uq' matches no site\. The model has 3 sites \(up, middle, down\).*`optional: true`"
    with pytest.raises(UsageError, match=wanted):
        compiled(rank=3, targets=["uq"])
    assert compiled(rank=3, targets=["uq", "up"], optional=True).plan.decisions[0].name == "up"


# Refusals.


def test_a_rank_that_is_not_possible_names_the_site(compiled: Compile) -> None:
    wanted = r"down: expected rank <= 10 \(min of in_features=16, out_features=10\), got 11\. Lower `rank`"
    with pytest.raises(UsageError, match=wanted):
        compiled(rank=11)


def test_a_solver_that_needs_data_says_so_when_there_is_none() -> None:
    wanted = r"calibration: a pass needs sample inputs.*Add `calibration: \{dataset: FILE\}`, or choose `solver: svd`"
    with pytest.raises(UsageError, match=wanted):
        lrc.compile(tiny.mlp(), tiny.factorize(solver="kfac", rank=3), inputs={"x": tiny.mlp_inputs()})


def test_a_budget_that_cannot_be_met_says_what_can(compiled: Compile) -> None:
    with pytest.raises(UsageError, match=r"rank\.params_kept: expected at least 0\.\d+ .*, got 0\.01"):
        compiled(solver="kfac", rank={"params_kept": 0.01})


def test_calibration_data_that_is_not_finite_names_the_site(compiled: Compile) -> None:
    with pytest.raises(SiteError, match=r"up: expected finite inputs on the calibration data, got NaN"):
        compiled(solver="kfac", rank=3, calibration=[{"x": torch.full((4, 12), torch.nan)}])
