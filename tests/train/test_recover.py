"""Recovery: low-rank updates of what compression left, against autograd, and what needs a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import captured_mlp, mlp_inputs
from torch import Tensor

import lrc
from lrc.api import Compiled
from lrc.errors import SpecError, UsageError
from lrc.train.checkpoint import Checkpoints

SQUEEZE = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.25}, "form": "two_factor"}
THIN = {"type": "recover", "updates": "low_rank", "rank": 2}


def follow(recipe: Any = "recover", **options: Any) -> dict[str, Any]:
    """Return the pass: distillation on the inputs that the perceptron is tested with."""
    return {
        "type": "train", "data": "tiny:calibration_of_mlp", "objective": "distillation", "steps": 30, "batch_size": 8,
        "schedule": "constant", "optimizer": {"type": "adamw", "lr": 1e-2}, "clip": None, "recipe": recipe, **options,
    }  # fmt: skip


def compiled(cache: Path, *passes: dict[str, Any]) -> Compiled:
    return lrc.compile(captured_mlp(), {"version": 1, "passes": list(passes)}, cache=cache, allow_code=True)


def factors(made: Compiled) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in made.program.tensors().items() if name.endswith((".A", ".B"))}


def losses(made: Compiled) -> list[float]:
    return [row["loss"] for row in made.training[0]["history"]]


def test_full_updates_are_training_as_usual(tmp_path: Path) -> None:
    plain, recovered = (compiled(tmp_path, SQUEEZE, follow(recipe)) for recipe in (None, "recover"))
    assert losses(recovered) == losses(plain)
    assert sum(losses(recovered)[-4:]) < 0.8 * sum(losses(recovered)[:4])


def test_low_rank_updates_move_factors_by_products_of_that_rank_and_bring_the_model_back(tmp_path: Path) -> None:
    before = factors(compiled(tmp_path, SQUEEZE))
    made = compiled(tmp_path, SQUEEZE, follow(THIN))
    moved = {name: value - before[name] for name, value in factors(made).items()}
    thin = {name for name, value in moved.items() if min(value.shape) > 2}
    assert thin
    assert {int(torch.linalg.matrix_rank(moved[name], rtol=1e-4)) for name in thin} == {2}
    assert sum(losses(made)[-4:]) < 0.9 * sum(losses(made)[:4])
    (note,) = [note for note in made.plan.notes if "updates of rank 2" in note]
    moves = sum(2 * sum(v.shape) if name in thin else v.numel() for name, v in moved.items()) + 20 + 10  # and two biases
    assert note.endswith(f"{moves} numbers, not {sum(v.numel() for v in moved.values()) + 30}")


def test_the_steps_are_those_of_autograd_on_the_thin_matrices(tmp_path: Path) -> None:
    """An independent run: P + 2 U V in place of P, U and V the leaves."""
    start = compiled(tmp_path, SQUEEZE)
    made = compiled(
        tmp_path, SQUEEZE, follow({**THIN, "alpha": 4}, steps=5, batch_size=128, optimizer={"type": "sgd", "lr": 0.05})
    )
    from tiny import calibration_of_mlp

    values = {n: t.detach().clone() for n, t in start.program.tensors().items()}
    generator, leaves, built = torch.Generator().manual_seed(0), {}, {}
    for name, P in values.items():
        if P.ndim == 2 and min(P.shape) > 2:
            V = torch.randn(2, P.shape[1], generator=generator) / P.shape[1] ** 0.5
            leaves[name] = (torch.zeros(len(P), 2, requires_grad=True), V.requires_grad_())
        else:
            built[name] = P.requires_grad_()
    x = torch.cat([batch["x"] for batch in calibration_of_mlp()])
    with torch.no_grad():
        wanted = start.dense(x=x)["output"]
    parameters = [*built.values(), *(t for pair in leaves.values() for t in pair)]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(5):
        now = built | {name: values[name] + 2 * U @ V for name, (U, V) in leaves.items()}
        found = torch.func.functional_call(start.program.graph_module, now, (), {"x": x})["output"]
        optimizer.zero_grad()
        ((found - wanted).square().sum() / wanted.square().sum()).backward()
        optimizer.step()
    ended = made.program.tensors()
    for name, (U, V) in leaves.items():
        assert torch.allclose(ended[name], values[name] + 2 * U @ V, atol=1e-6), name


def test_restarts_add_ranks_up(tmp_path: Path) -> None:
    before = factors(compiled(tmp_path, SQUEEZE))
    made = compiled(tmp_path, SQUEEZE, follow({**THIN, "rank": 1, "restart": 10}))
    ranks = {
        name: int(torch.linalg.matrix_rank(value - before[name], rtol=1e-4))
        for name, value in factors(made).items()
        if min(value.shape) > 2
    }
    assert set(ranks.values()) == {3}


@pytest.mark.parametrize("restart", [None, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(restart: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = THIN if restart is None else {**THIN, "restart": restart}
    undisturbed = factors(compiled(tmp_path / "a", SQUEEZE, follow(recipe, steps=12)))
    save = Checkpoints.save

    def killed(self: Checkpoints, step: int, state: dict[str, Any]) -> Path:
        made = save(self, step, state)
        if step == 6:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            compiled(tmp_path / "b", SQUEEZE, follow(recipe, steps=12, checkpoint_every=3))
    resumed = factors(compiled(tmp_path / "b", SQUEEZE, follow(recipe, steps=12, checkpoint_every=3)))
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_the_outputs_are_those_of_the_values_that_are_left(tmp_path: Path) -> None:
    made = compiled(tmp_path, SQUEEZE, follow(THIN))
    x = mlp_inputs()
    assert torch.equal(made.graft()(x), made.program(x=x)["output"])


def test_what_cannot_be_recovered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe recover.*Put `factorize`"):
        compiled(tmp_path, follow(parameters="all"))
    with pytest.raises(SpecError, match="follows the uncompressed model, and `objective: regression` does not look at it"):
        compiled(tmp_path, SQUEEZE, follow(objective="regression"))
    with pytest.raises(SpecError, match="`rank` is of low-rank updates"):
        compiled(tmp_path, SQUEEZE, follow({"type": "recover", "rank": 3}))
    with pytest.raises(UsageError, match="`per_layer` frees"):
        compiled(tmp_path, SQUEEZE, follow(THIN, per_layer=True))


def test_pruned_weights_are_recovered_too(tmp_path: Path) -> None:
    prune = {"type": "prune", "method": {"type": "structured", "amount": {"width_kept": 0.6}}}
    made = compiled(tmp_path, prune, follow(THIN, optimizer={"type": "adamw", "lr": 3e-2}))
    assert losses(made)[-1] < 0.9 * losses(made)[0]
    assert any("3 matrices moved by updates of rank 2" in note for note in made.plan.notes)
