"""Passes in the midst of training: when they run, what goes on after them, and what a killed run resumes to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lrc_passes.train_during import During, stretches
from tiny import LAYERS, captured_mlp, mlp_inputs
from torch import Tensor

import lrc
from lrc.api import Compiled
from lrc.errors import SpecError, UsageError
from lrc.program import Program
from lrc.train.checkpoint import Checkpoints
from lrc.train.settings import Part

SQUEEZE = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.5}, "form": "two_factor"}
RANKS = {"type": "prune", "method": {"type": "ranks", "criterion": "singular", "rank": {"fraction": 0.25}}}


def narrow(kept: float) -> dict[str, Any]:
    return {"type": "prune", "method": {"type": "structured", "amount": {"width_kept": kept}}}


def train(**options: Any) -> dict[str, Any]:
    return {
        "type": "train", "data": "tiny:calibration_of_mlp", "objective": "distillation", "steps": 40, "batch_size": 8,
        "schedule": "cosine", "optimizer": {"type": "adamw", "lr": 1e-2}, **options,
    }  # fmt: skip


def compiled(cache: Path, *passes: dict[str, Any], program: Program | None = None) -> Compiled:
    document = {"version": 1, "passes": list(passes)}
    return lrc.compile(program or captured_mlp(), document, cache=cache, allow_code=True)


def values(made: Compiled) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in made.program.tensors().items()}


def rank_of(made: Compiled, fqn: str) -> int:
    return len(made.program.tensors()[f"{fqn}.A"])


def test_a_run_is_cut_at_shares_of_its_steps() -> None:
    assert stretches([], 10)[0].part == Part(0, 10)
    entries = [During.model_validate({"at": [0.25, 0.5], "passes": [RANKS]}), During.model_validate({"passes": [narrow(0.5)]})]
    found = stretches(entries, 100)
    assert [s.part for s in found] == [Part(0, 25, final=False), Part(25, 50, final=False), Part(50, 100)]
    assert [[p.method.type for p in s.passes] for s in found] == [["ranks"], ["ranks", "structured"], []]
    assert [s.part.end for s in stretches(entries, 2)] == [1, 2]
    late_first = [During.model_validate({"at": at, "passes": [by]}) for at, by in ((0.6, narrow(0.5)), (0.4, RANKS))]
    assert [p.method.type for p in stretches(late_first, 2)[0].passes] == [
        "ranks",
        "structured",
    ]  # by their shares
    with pytest.raises(UsageError, match="two steps at least"):
        stretches(entries, 1)


def test_products_shrink_while_they_are_trained(tmp_path: Path) -> None:
    made = compiled(tmp_path, SQUEEZE, train(during=[RANKS]))
    whole, end = compiled(tmp_path, SQUEEZE, train()), compiled(tmp_path, SQUEEZE, train(), RANKS)
    assert rank_of(made, "up") == rank_of(end, "up") < rank_of(whole, "up")
    rows = made.training[0]["history"]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[:20] == whole.training[0]["history"][:20]
    assert [row["lr"] for row in rows] == [row["lr"] for row in whole.training[0]["history"]]  # one schedule over all
    x = mlp_inputs(64, 9)
    with torch.no_grad():
        wanted = made.dense(x=x)["output"]
        late, early = ((c.program(x=x)["output"] - wanted).square().sum() for c in (end, made))
    assert early < late  # what is cut on the way is made up for
    pruned = [d for d in made.plan.decisions if d.type == "prune"]
    assert {d.sites[0] for d in pruned} == {"up", "middle", "down"}
    assert all("after step 20 of training" in d.notes for d in pruned)
    assert len(made.training) == 1


def test_the_plan_tells_what_will_run_and_changes_nothing(tmp_path: Path) -> None:
    program = captured_mlp().clone()
    before = program.digest()
    document = {"version": 1, "passes": [SQUEEZE, train(during=[RANKS])]}
    plan = lrc.plan(program, document, cache=tmp_path, allow_code=True)
    assert program.digest() == before
    pruned = [d for d in plan.decisions if d.type == "prune"]
    assert len(pruned) == 3
    assert all(d.after.parameters < d.before.parameters for d in pruned)
    assert "passes after `train` are planned on the values before it" in plan.notes
    assert plan.parameters == compiled(tmp_path, SQUEEZE, train(during=[RANKS])).plan.parameters


def test_widths_fall_in_stages_to_what_one_cut_leaves(tmp_path: Path) -> None:
    stages = [{"at": 0.2, "passes": [narrow(0.8)]}, {"at": 0.4, "passes": [narrow(0.75)]}]
    made = compiled(tmp_path, train(during=stages, parameters="all"))
    assert made.program.site("up").out_features == 12  # 20 -> 16 -> 12
    assert made.program.site("middle").out_features == 9  # 16 -> 12 -> 9
    x = mlp_inputs()
    assert torch.equal(made.graft()(x), made.program(x=x)["output"])
    assert [d.after.parameters for d in made.plan.decisions if d.sites == ("up",)][-1] == 12 * 13


def test_states_of_what_kept_its_shape_go_on(tmp_path: Path) -> None:
    """A pass that changes nothing in the midst changes nothing at all."""
    nothing = {"type": "prune", "method": {"type": "ranks", "criterion": "gates"}}
    for optimizer in ({"type": "adamw", "lr": 1e-2}, {"type": "galore", "lr": 1e-2, "rank": 2, "update_proj_gap": 7}):
        options = {"optimizer": optimizer, "steps": 12}
        plain, cut = (compiled(tmp_path, SQUEEZE, train(**options, during=d)) for d in ([], [nothing]))
        assert all(torch.equal(t, values(cut)[name]) for name, t in values(plain).items())
    per_layer = {"steps": 12, "per_layer": True, "clip": None}
    plain, cut = (compiled(tmp_path, SQUEEZE, train(**per_layer, during=d)) for d in ([], [nothing]))
    assert all(torch.equal(t, values(cut)[name]) for name, t in values(plain).items())


@pytest.mark.parametrize("stop", [3, 10, 14])
def test_a_killed_run_goes_on_to_the_same_bytes(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = SQUEEZE, train(during=[RANKS], steps=20, checkpoint_every=1)
    undisturbed = values(compiled(tmp_path / "a", *passes))
    save = Checkpoints.save

    def killed(self: Checkpoints, step: int, state: dict[str, Any]) -> Path:
        made = save(self, step, state)
        if step == stop:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            compiled(tmp_path / "b", *passes)
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda self, step, state: (steps.append(step), save(self, step, state))[1])
        resumed = values(compiled(tmp_path / "b", *passes))
    assert steps[0] == stop + 1
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[name]) for name, t in undisturbed.items())


def test_a_validation_prefers_no_state_from_before_the_last_pass(tmp_path: Path) -> None:
    judged = {"data": "tiny:calibration_of_mlp", "every": 5, "patience": 1}
    made = compiled(
        tmp_path, SQUEEZE, train(during=[RANKS], validation=judged, steps=40, optimizer={"type": "adamw", "lr": 0.3})
    )
    record = made.training[0]
    assert record["best_step"] > 20
    assert sum("validation" in row for row in record["history"][:20]) == 4
    assert rank_of(made, "up") < rank_of(compiled(tmp_path, SQUEEZE), "up")


@pytest.mark.parametrize("recipe", ["maestro", {"type": "recover", "updates": "low_rank", "rank": 1}])
def test_recipes_go_on_with_what_is_left(recipe: Any, tmp_path: Path) -> None:
    by = {"type": "prune", "method": {"type": "ranks", "criterion": "order", "rank": {"fraction": 0.25}}}
    made = compiled(tmp_path, SQUEEZE, train(recipe=recipe, during=[{"at": 0.5, "passes": [by]}]))
    assert rank_of(made, "up") < rank_of(compiled(tmp_path, SQUEEZE), "up")
    assert len(made.training[0]["history"]) == 40


@pytest.mark.slow
def test_gates_that_are_closed_go_on_the_way(llama: Path, data: Path, tmp_path: Path) -> None:
    adapt = {"type": "adapt", "method": "sora", "targets": [LAYERS], "rank": 4}
    learn = train(recipe={"type": "sora", "to": 3e-2, "values": 3, "each": 8}) | {
        "data": {"dataset": str(data / "stream.txt"), "max_length": 16}, "objective": "causal_lm", "schedule": "constant",
        "optimizer": {"type": "proximal_adamw", "lr": 1e-2, "threshold": 1e-2},
        "during": [{"at": [0.5, 0.9], "passes": [{"type": "prune", "method": "ranks"}]}],
    }  # fmt: skip
    made = compiled(tmp_path, adapt, learn, program=lrc.capture(str(llama)))
    gates = [p for n, p in made.program.graph_module.named_parameters() if n.endswith("gate.diagonal")]
    assert sum(len(g) for g in gates) < 28
    assert any("gates are closed" in note for note in made.plan.notes)


def test_what_cannot_be_interrupted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe `lr2vq` decides over the whole run"):
        compiled(tmp_path, SQUEEZE, train(recipe="lr2vq", during=[RANKS]))
    with pytest.raises(SpecError, match=r"pass `train` has no place here"):
        compiled(tmp_path, SQUEEZE, train(during=[train()]))
    with pytest.raises(SpecError, match=r"during\.0.*at"):
        compiled(tmp_path, SQUEEZE, train(during=[{"at": 1.0, "passes": [RANKS]}]))
    with pytest.raises(SpecError, match="one share of the steps at least"):
        compiled(tmp_path, SQUEEZE, train(during=[{"at": [], "passes": [RANKS]}]))
    with pytest.raises(SpecError, match=r"unknown pass 'prunne'.*Did you mean 'prune'"):
        compiled(tmp_path, SQUEEZE, train(during=["prunne"]))
