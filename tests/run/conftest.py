"""What the tests of the runner and the passes share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

import lrc
from lrc.data import batches_of
from lrc.measure import Cache
from lrc.run import Session

GOLDEN = Path(__file__).parent / "golden"
Compile = Callable[..., lrc.Compiled]


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """A function that compares a text with a golden file beside the tests; `--rewrite-golden` writes it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--rewrite-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; `pytest --rewrite-golden` writes it anew"

    return compare


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., Session]:
    """A function that makes the session of a run on calibration batches of the perceptron, with a cache of its own."""

    def make(given: Iterable[Any] = (), **options: Any) -> Session:
        batches = list(given) or tiny.calibration_of_mlp()
        return Session(cache=Cache(tmp_path / "cache"), batches=lambda: batches_of(batches, list(batches[0])), **options)

    return make


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """A function that compiles a module with one pass `factorize`, by default the perceptron on its calibration data."""

    def run(model: nn.Module | None = None, *, inputs: Any = None, calibration: Any = None, **options: Any) -> lrc.Compiled:
        given = tiny.captured_mlp() if model is None else model
        examples = {"x": tiny.mlp_inputs()} if inputs is None else inputs
        batches = tiny.calibration_of_mlp() if calibration is None else calibration
        return lrc.compile(
            given, tiny.factorize(**options), inputs=examples, calibration=batches, cache=tmp_path / "cache"
        )  # fmt: skip

    return run
