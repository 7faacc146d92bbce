"""Results on disk: found by their content, whole or not at all."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from lrc.errors import LrcError
from lrc.measure import Cache, digest

TENSORS = {
    "gram": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "index": torch.tensor([2, 0, 1], dtype=torch.int32),
    "nothing": torch.zeros(0, 4),
    "number": torch.tensor(3.0),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entry(cache: Cache) -> Path:
    (path,) = cache.folder.glob("??/*.safetensors")
    return path


def assert_equal(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# Entries.


def test_tensors_of_every_type_come_back_as_they_were(cache: Cache) -> None:
    cache.put("a-key", TENSORS)
    assert_equal(cache.get("a-key"), TENSORS)
    assert "a-key" in cache
    assert cache.size() == (1, entry(cache).stat().st_size)
    assert_equal(Cache(cache.folder).get("a-key"), TENSORS)


def test_an_unknown_key_is_a_miss(cache: Cache) -> None:
    assert cache.get("a-key") is None
    assert "a-key" not in cache
    assert cache.size() == (0, 0)


def test_views_and_parameters_are_stored_by_value(cache: Cache) -> None:
    base = torch.randn(4, 6)
    views = {"rows": base[1:3], "columns": base[:, ::2], "turned": base.T, "same": base[1:3], "p": torch.nn.Parameter(base)}
    cache.put("views", views)
    assert_equal(cache.get("views"), {name: tensor.detach() for name, tensor in views.items()})
    found = cache.get("views")
    assert found is not None
    found["rows"].zero_()  # what was read belongs to the reader
    assert_equal(cache.get("views"), {name: tensor.detach() for name, tensor in views.items()})
    assert base[1:3].any()


def test_an_entry_is_replaced(cache: Cache) -> None:
    cache.put("k", {"a": torch.zeros(3)})
    cache.put("k", {"b": torch.ones(2)})
    assert_equal(cache.get("k"), {"b": torch.ones(2)})
    assert cache.size()[0] == 1


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "a b", "ü", "a\n"])
def test_a_key_that_is_no_file_name_is_refused(key: str, cache: Cache) -> None:
    with pytest.raises(ValueError, match=r"a cache key is made of letters, digits"):
        cache.put(key, TENSORS)
    with pytest.raises(ValueError, match=r"a cache key is made of letters, digits"):
        cache.get(key)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "renamed", "no_sum"])
def test_a_damaged_entry_is_a_miss_and_makes_room(damage: str, cache: Cache) -> None:
    cache.put("k", {"a": torch.randn(64)})
    path = entry(cache)
    data = path.read_bytes()
    if damage == "renamed":  # whole, but another key's
        cache.put("other", {"a": torch.randn(64)})
        data = cache._path("other").read_bytes()
    if damage == "no_sum":
        from safetensors.torch import save

        data = save({"a": torch.randn(64)})
    damaged = {"cut": data[:-7], "empty": b"", "garbage": b"x" * 300, "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}
    path.write_bytes(damaged.get(damage, data))
    assert cache.get("k") is None
    assert not path.exists()
    cache.put("k", TENSORS)
    assert_equal(cache.get("k"), TENSORS)


# Writing.

WRITER = """
import os, signal, sys, torch
import lrc.measure.cache as cache_module
real = os.fsync
def killed(file):
    real(file)
    os.kill(os.getpid(), signal.SIGKILL)
made = cache_module.Cache(sys.argv[1])
made.put("whole", {"a": torch.ones(3)})
cache_module.os.fsync = killed
made.put("half", {"a": torch.ones(1000)})
"""


def test_a_killed_writer_leaves_nothing_to_be_seen(cache: Cache) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(cache.folder)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(cache.folder.glob("??/.*.tmp"))) == 1
    assert cache.get("half") is None
    assert_equal(cache.get("whole"), {"a": torch.ones(3)})
    assert cache.size()[0] == 1
    opened = Cache(cache.folder)  # sweeps
    assert not list(cache.folder.glob("??/.*.tmp"))
    assert_equal(opened.get("whole"), {"a": torch.ones(3)})
    opened.put("half", {"a": torch.ones(2)})
    assert_equal(cache.get("half"), {"a": torch.ones(2)})


def test_a_file_that_another_process_is_writing_is_not_swept(cache: Cache) -> None:
    import fcntl

    cache.put("k", {"a": torch.ones(3)})
    path = entry(cache).parent / ".k.safetensors.1-1.tmp"
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Cache(cache.folder)
        assert path.exists()
    Cache(cache.folder)
    assert not path.exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_an_error_with_a_remedy_and_keeps_the_old_entry(
    call: str, error: int, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put("k", {"a": torch.ones(3)})

    def full(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(f"lrc.measure.cache.os.{call}", full)
    with pytest.raises(LrcError) as caught:
        cache.put("k", TENSORS)
    monkeypatch.undo()
    assert caught.value.where.endswith("k.safetensors")
    assert caught.value.message == f"the cache cannot be written: {os.strerror(error)}"
    assert caught.value.hint == "Free some space, or name another folder with `calibration.cache`"
    assert_equal(cache.get("k"), {"a": torch.ones(3)})
    assert not list(cache.folder.glob("??/.*.tmp"))


def test_a_cache_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(LrcError, match="the cache cannot be written"):
        Cache(tmp_path / "cache").put("k", TENSORS)
    assert Cache(tmp_path / "cache").get("k") is None
    assert (tmp_path / "cache").read_text() == "a file"


# Digests.


class Options(BaseModel):
    rank: int
    name: str = "a"


@dataclasses.dataclass
class Plain:
    rank: int
    names: tuple[str, ...] = ()


def test_a_digest_is_the_same_for_equal_values() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert digest(x) == digest(x.clone()) == digest(torch.nn.Parameter(x)) == digest(x.T.contiguous().T)
    assert digest(Options(rank=1)) == digest(Options(rank=1, name="a"))
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    assert digest({3, 1, 2}) == digest({2, 3, 1})
    assert digest(Path("a") / "b") == digest(Path("a/b"))
    assert len(digest()) == 64


def test_a_digest_tells_values_types_shapes_and_order_apart() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    nudged = x.clone()
    nudged[2, 3] = torch.nextafter(nudged[2, 3], torch.tensor(99.0))
    values: list[tuple[Any, ...]] = [
        (x,), (x.T,), (x.flatten(),), (x[None],), (x.double(),), (x.half(),), (x.int(),), (nudged,), (x, x), (-x,),
        (torch.tensor(0.0),), (torch.tensor(-0.0),), (torch.tensor([0.0]),), (torch.zeros(0),), (torch.zeros(0, 2),),
        (torch.zeros(2, 0),),
        (), (None,), (1,), (1.0,), (True,), ("1",), (b"1",), (0,), (False,), ("",), ("None",), ("True",), (-1,), (10**30,),
        (float("nan"),), (float("inf"),), (1e-300,),
        ("a", "b"), ("b", "a"), ("ab",), ("a", "", "b"), (["a", "b"],), (["ab"],), ({"a", "b"},), ({"a": "b"},),
        (["a"], ["b"]), ([["a"], "b"],), ([],), ({},), (set(),),
        ({1: "a", 2: "b"},), ({1: "b", 2: "a"},), ({"1": "a", "2": "b"},),
        (torch.float32,), (torch.float64,), (torch.int64,),
        (Options(rank=1),), (Options(rank=2),),
        (Plain(rank=1),), (Plain(rank=1, names=("a",)),), (Plain(rank=1, names=("b",)),),
    ]  # fmt: skip
    digests = [digest(*parts) for parts in values]
    twins = [(values[i], values[j]) for i in range(len(values)) for j in range(i) if digests[i] == digests[j]]
    assert twins == []


def test_a_digest_is_the_same_in_every_process_and_version() -> None:
    assert digest("spectrum-1", torch.arange(3.0), {"rank": 2}) == (
        "cfbbaac901d16097e1a0e5a3750575e77cb4f8b6643d8da3e4131333495d4f27"
    )


def test_what_has_no_digest_is_refused() -> None:
    for value in (object(), digest, Plain, iter([1])):
        with pytest.raises(TypeError, match="cannot take the digest of a "):
            digest(value)
