"""Predicted memory: at least what solvers of weights and of modules allocate, and at most twice that; a step of Maestro."""

from pathlib import Path
from typing import Any

import pytest
import tiny

import lrc
from lrc.program import Program
from lrc.run import pipeline
from lrc.run.groups import GroupStore
from lrc.run.session import Session
from lrc.train.memory import Watch


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A decoder whose MLP is four times as wide as what it reads."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    return lrc.capture(tiny.write_llama(folder, hidden_size=64, intermediate_size=256, num_key_value_heads=4))


@pytest.mark.parametrize(
    "solver", ["modular", {"type": "basis_sharing", "share": "all"}, {"type": "kfac", "modules": False}, "kfac", "afm"]
)
def test_the_work_of_the_largest_decomposition_is_predicted(
    solver: Any, wide: Program, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the storages of its tensors; the moments that it is given are counted apart."""
    peaks, said = [0], [0]
    numbers = pipeline.work_numbers
    solve_group, solve_site = GroupStore._solve, Session.solve

    def watched(solve: Any) -> Any:
        def run(*args: Any) -> Any:
            with Watch() as watch:
                found = solve(*args)
            peaks.append(watch.peak)
            return found

        return run

    monkeypatch.setattr(GroupStore, "_solve", watched(solve_group))
    monkeypatch.setattr(Session, "solve", watched(solve_site))
    monkeypatch.setattr(pipeline, "work_numbers", lambda *args: said.append(8 * numbers(*args)) or numbers(*args))
    asked = {
        "version": 1,
        "calibration": {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 16},
        "passes": [{"type": "factorize", "targets": [tiny.LAYERS], "solver": solver, "rank": {"params_kept": 0.7}}],
    }
    lrc.plan(wide, asked, cache=tmp_path / "cache")
    assert max(peaks) <= max(said) <= 2 * max(peaks)


@pytest.mark.parametrize("sampler", ["single_layer", "independent"])
def test_a_step_of_maestro_counts_the_factors_that_its_penalty_copies(
    sampler: str, wide: Program, data: Path, tmp_path: Path
) -> None:
    recipe = {"type": "maestro", "sampler": sampler}
    asked = {
        "version": 1,
        "passes": [
            {"type": "factorize", "targets": [tiny.LAYERS], "solver": "svd", "rank": {"fraction": 0.6}, "form": "two_factor"},
            {
                "type": "train",
                "data": str(data / "stream.txt"),
                "objective": "causal_lm",
                "steps": 4,
                "batch_size": 1,
                "recipe": recipe,
            },
        ],
    }
    (found,) = lrc.compile(wide, asked, cache=tmp_path / "cache").training
    memory = found["memory"]
    assert 0.9 * memory["measured"] <= memory["predicted"] <= 1.1 * memory["measured"]
