"""Results on disk, found by the content that they were computed from."""

import dataclasses
import hashlib
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lrc.errors import LrcError

if sys.platform != "win32":
    import fcntl

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def digest(*parts: object) -> str:
    """Return the sha256 of the values and types of `parts`, 64 hexadecimal digits.

    Takes tensors (dtype, shape and bytes, read without a copy where the tensor is contiguous on the CPU), numbers, text,
    bytes, None, paths, torch dtypes, dataclasses, pydantic models, mappings, sequences and sets, nested. The order of a
    mapping or set does not matter. Raises TypeError for anything else.
    """
    sha = hashlib.sha256()
    for part in parts:
        _feed(sha, part)
    return sha.hexdigest()


def _feed(sha: "hashlib._Hash", part: object) -> None:
    """Add one value, told apart from its neighbours by a type name and a length."""
    if isinstance(part, Tensor):
        data = part.detach().cpu().contiguous()
        sha.update(f"tensor:{data.dtype}:{tuple(data.shape)};".encode())
        if data.numel():
            sha.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy arrays are buffers
    elif part is None or isinstance(part, bool | int | float | torch.dtype):
        sha.update(f"{type(part).__name__}:{part!r};".encode())
    elif isinstance(part, str | bytes | Path):
        data_bytes = part if isinstance(part, bytes) else str(part).encode()
        sha.update(f"{'bytes' if isinstance(part, bytes) else 'str'}:{len(data_bytes)}:".encode() + data_bytes)
    elif isinstance(part, BaseModel):
        _feed(sha, part.model_dump())
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        _feed(sha, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
    elif isinstance(part, Mapping):
        _feed_all(sha, "map", sorted(digest(key) + digest(value) for key, value in part.items()))
    elif isinstance(part, Set):
        _feed_all(sha, "set", sorted(digest(item) for item in part))
    elif isinstance(part, Sequence):
        _feed_all(sha, "list", part)
    else:
        raise TypeError(f"cannot take the digest of a {type(part).__qualname__}")


def _feed_all(sha: "hashlib._Hash", kind: str, items: Sequence[object]) -> None:
    sha.update(f"{kind}:{len(items)};".encode())
    for item in items:
        _feed(sha, item)


class Cache:
    """A folder of named tensors, one safetensors file a key.

    An entry appears whole or not at all: it is written beside its place, flushed to the disk and renamed. An entry that
    does not read back as it was written is a miss, is removed and gets replaced. Several processes may share a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._sweep()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under `key`, or None."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                wanted = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            wanted, tensors = None, {}
        if wanted != digest(key, tensors):
            path.unlink(missing_ok=True)
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors` under `key`, in place of what was there. Raises LrcError when the disk does not take it."""
        path = self._path(key)
        whole = {name: _own(value) for name, value in tensors.items()}
        data = save(whole, metadata={"sha256": digest(key, whole)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, data)
        except OSError as error:
            raise LrcError(
                str(path),
                message=f"the cache cannot be written: {error.strerror or error}",
                hint="Free some space, or name another folder with `calibration.cache`",
            ) from error

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*.safetensors")]
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is made of letters, digits, `.`, `_` and `-`, got {key!r}")
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:2] / f"{key}.safetensors"

    def _sweep(self) -> None:
        """Remove what killed processes left half-written; a file that is being written is locked by its writer."""
        for path in self.folder.glob("??/.*.tmp"):
            with suppress(OSError), open(path, "r+b") as file:
                _lock(file)
                path.unlink()


def _own(tensor: Tensor) -> Tensor:
    """Return the values in memory of their own: safetensors refuses tensors that share a storage."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as file:
            _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(file: IO[bytes]) -> None:
    """Take the file for this process. Raises OSError when another one writes it."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
