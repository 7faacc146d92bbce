"""What the tests of the verification share."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path) -> None:
    """Run every test in a folder of its own."""
