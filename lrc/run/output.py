"""An output folder that appears whole, or not at all.

Everything is written into a hidden sibling (`.NAME.partial`, so on the same filesystem) and renamed at the end. A journal
there says which steps are finished, for which run, and with which bytes; a run that was killed takes them over.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lrc.errors import LowerError, LrcError, UsageError

JOURNAL = "journal.json"
SPARE = 1 << 20  # with fewer bytes free, a writer that failed did so for want of space
MARK = Path("lrc") / "manifest.json"  # what only a finished folder of ours has


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old bytes or the new ones, also after a crash."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


class OutputFolder:
    """The folder that a run leaves.

    path: where it shall be; key: the hash of everything that decides its bytes. An existing folder is refused unless it is
    empty, or `overwrite` is set and it is a finished output of ours. resume: take over what a killed run had finished.
    """

    def __init__(self, path: Path, key: str, *, overwrite: bool = False, resume: bool = True) -> None:
        self.path = path.absolute()
        self.key = key
        self.overwrite = overwrite
        self.resume = resume
        self.staging = self.path.with_name(f".{self.path.name}.partial")
        self._lock: IO[str] | None = None
        self._done: dict[str, dict[str, str]] = {}

    def check(self) -> None:
        """Refuse, before any work, a folder that could not be written at the end. Raises UsageError."""
        if self.path.is_dir() and any(self.path.iterdir()):
            ours = (self.path / MARK).is_file()
            if not (ours and self.overwrite):
                hint = "Add `--overwrite` to replace it" if ours else "Choose another folder, or empty this one"
                raise UsageError(str(self.path), expected="an empty or absent output folder", got="files in it", hint=hint)
        elif self.path.exists() and not self.path.is_dir():
            raise UsageError(str(self.path), expected="a folder", got="a file", hint="Choose another output folder")
        parent = next(p for p in self.path.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(str(self.path), message=f"{parent} is not writable", hint="Choose another output folder")

    def __enter__(self) -> "OutputFolder":
        self.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self._old.exists() and not self.path.exists():
            self._old.rename(self.path)  # killed while publishing, between two renames
        self._done = self._finished_steps() if self.resume else {}
        if not self._done and self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir(exist_ok=True)
        for unfinished in self.staging.glob(".step-*"):
            shutil.rmtree(unfinished)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()

    @property
    def _old(self) -> Path:
        return self.path.with_name(f".{self.path.name}.old")

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def _take_lock(self) -> None:
        self._lock = self._lock_path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise UsageError(
                str(self.path), message="another run is writing this folder", hint="Wait for it, or choose another one"
            ) from error

    def _finished_steps(self) -> dict[str, dict[str, str]]:
        """Return the finished steps of a killed run with the same key, as step -> file -> sha256."""
        try:
            journal = json.loads((self.staging / JOURNAL).read_text(encoding="utf-8"))
            if journal["key"] != self.key:
                return {}
            done: dict[str, dict[str, str]] = journal["done"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {step: files for step, files in done.items() if self._intact(files)}

    def _intact(self, files: dict[str, str]) -> bool:
        return all((self.staging / f).is_file() and sha256(self.staging / f) == h for f, h in files.items())

    def finished(self, step: str) -> bool:
        """Say whether a step's files are there from an earlier, killed run."""
        return step in self._done

    def steps(self) -> list[str]:
        """Return the finished steps, in order."""
        return list(self._done)

    def files(self, step: str) -> dict[str, str]:
        """Return the files of a finished step, as relative path -> sha256."""
        return self._done[step]

    @contextmanager
    def step(self, name: str) -> Iterator[Path]:
        """Give a scratch folder; what is in it at the end becomes part of the output, all at once.

        Raises LowerError when the disk is full.
        """
        scratch = self.staging / f".step-{name}"
        scratch.mkdir()
        try:
            yield scratch
            self._adopt(name, scratch)
        except Exception as error:  # writers raise errors of their own when the disk is full
            if not self._disk_is_full(error):
                raise
            raise self._full(name) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _disk_is_full(self, error: Exception) -> bool:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        return "No space left" in str(error) or "os error 28" in str(error) or shutil.disk_usage(self.staging).free < SPARE

    def _full(self, name: str) -> LrcError:
        free = shutil.disk_usage(self.path.parent).free
        return LowerError(
            str(self.path),
            message=f"the disk is full ({free / 1e6:.0f} MB free) while writing `{name}`",
            hint="Free some space and run the same command again: finished steps are kept",
        )

    def _adopt(self, name: str, scratch: Path) -> None:
        files: dict[str, str] = {}
        for source in sorted(p for p in scratch.rglob("*") if p.is_file()):
            relative = source.relative_to(scratch)
            _sync_file(source)
            files[str(relative)] = sha256(source)
            target = self.staging / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
        self._done[name] = files
        write_atomically(self.staging / JOURNAL, json.dumps({"key": self.key, "done": self._done}))

    def publish(self) -> Path:
        """Make the finished folder appear under its name. Returns its path."""
        (self.staging / JOURNAL).unlink(missing_ok=True)
        _sync_folder(self.staging)
        shutil.rmtree(self._old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(self._old)
        self.staging.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        return self.path


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
