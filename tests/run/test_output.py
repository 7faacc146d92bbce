"""The output folder appears whole or not at all."""

import errno
from pathlib import Path

import pytest

from lrc.errors import LowerError, UsageError
from lrc.run.output import MARK, OutputFolder


def write(folder: OutputFolder, step: str, name: str, text: str = "x") -> None:
    with folder.step(step) as scratch:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(text)


def fail(folder: OutputFolder, error: Exception) -> None:
    with folder.step("hf") as scratch:
        (scratch / "half").write_text("x")
        raise error


def test_nothing_appears_before_publish(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "k") as folder:
        write(folder, "hf", "config.json")
        assert not (tmp_path / "out").exists()
        folder.publish()
    assert (tmp_path / "out" / "config.json").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_finished_steps_of_a_killed_run_are_taken_over(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "k") as killed:
        write(killed, "hf", "config.json")
        write(killed, "onnx", "onnx/model.onnx")
    with OutputFolder(tmp_path / "out", "k") as folder:
        assert folder.finished("hf")
        assert folder.finished("onnx")
        assert not folder.finished("aoti")


def test_another_run_starts_from_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "k") as killed:
        write(killed, "hf", "config.json")
    with OutputFolder(tmp_path / "out", "other") as folder:
        assert not folder.finished("hf")
        assert not (folder.staging / "config.json").exists()


def test_a_changed_file_is_not_taken_over(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "k") as killed:
        write(killed, "hf", "config.json")
        (killed.staging / "config.json").write_text("damaged")
    with OutputFolder(tmp_path / "out", "k") as folder:
        assert not folder.finished("hf")


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "k") as folder:
        with pytest.raises(RuntimeError, match="boom"):
            fail(folder, RuntimeError("boom"))
        assert list(folder.staging.iterdir()) == []


def test_a_full_disk_is_said_with_the_remedy(tmp_path: Path) -> None:
    wanted = r"disk is full .* while writing `hf`.*run the same command again"
    with OutputFolder(tmp_path / "out", "k") as folder, pytest.raises(LowerError, match=wanted):
        fail(folder, OSError(errno.ENOSPC, "No space left on device"))


def test_a_folder_with_files_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="empty or absent output folder"):
        OutputFolder(out, "k", overwrite=True).check()
    assert (out / "mine.txt").read_text() == "mine"


def test_a_finished_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / MARK).parent.mkdir(parents=True)
    (out / MARK).write_text("{}")
    with pytest.raises(UsageError, match="--overwrite"):
        OutputFolder(out, "k").check()
    with OutputFolder(out, "k", overwrite=True) as folder:
        write(folder, "hf", "new")
        folder.publish()
    assert [p.name for p in out.iterdir()] == ["new"]


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    second = OutputFolder(tmp_path / "out", "k")
    with OutputFolder(tmp_path / "out", "k"), pytest.raises(UsageError, match="another run is writing"):
        second.__enter__()


def test_a_file_in_the_way_and_an_unwritable_parent_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="expected a folder, got a file"):
        OutputFolder(tmp_path / "file", "k").check()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="not writable"):
        OutputFolder(tmp_path / "out", "k").check()
