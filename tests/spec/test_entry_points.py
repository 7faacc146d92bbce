"""What the installed package says of itself is what pyproject.toml says."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path


def test_the_installed_package_knows_every_entry_point() -> None:
    """Else methods are missing from the registries, and from the schema, though they are in the code."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    groups = tomllib.loads(text)["project"]["entry-points"]
    missing = [
        f"{group}: {name} = {value}"
        for group, rules in groups.items()
        for name, value in rules.items()
        if value not in {entry.value for entry in entry_points(group=group)}
    ]
    assert not missing, f"install again (`pip install -e .`), or add this to the metadata in use: {missing}"
