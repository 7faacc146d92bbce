"""Checkpoints of a training run, found by the content that the run is made from; resuming gives the same bytes."""

import os
from pathlib import Path
from typing import Any

import torch

from lrc.errors import TrainError

KEPT = 2  # of which one is whole even if the newest cannot be read


class Checkpoints:
    """A folder of checkpoints `step-00000100.pt`: tensors and plain data, read without running code from them.

    A checkpoint appears whole or not at all; one that cannot be read is left out. The two newest are kept. The folder carries
    the hash of everything that the run depends on, so another run never takes them over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> dict[str, Any] | None:
        """Return the newest checkpoint that can be read, or None."""
        for path in reversed(self._paths()):
            try:
                found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # a damaged file makes torch.load raise whatever its bytes happen to mean
                path.unlink(missing_ok=True)
                continue
            return found
        return None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove all but the two newest. Raises TrainError when the disk does not take it."""
        path = self.folder / f"step-{step:08d}.pt"
        beside = path.with_suffix(f".{os.getpid()}.new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            raise TrainError(str(path), message=f"the checkpoint cannot be written: {error}", hint="Free some space") from error
        for old in self._paths()[:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def last(self) -> Path | None:
        """Return the path of the newest checkpoint, or None."""
        paths = self._paths()
        return paths[-1] if paths else None

    def _paths(self) -> list[Path]:
        for stale in self.folder.glob("*.new"):
            if not _alive(stale):
                stale.unlink(missing_ok=True)
        return sorted(self.folder.glob("step-*.pt"))


def _alive(path: Path) -> bool:
    """Say whether the process that writes a file is still there."""
    try:
        os.kill(int(path.name.split(".")[-2]), 0)
    except (ValueError, OSError):
        return False
    return True
