"""The whole job: an output folder that is complete, resumable, and says what it is."""

import errno
import getpass
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import lrc
from lrc.api import Finished, compile_to_folder
from lrc.errors import GateError, LowerError, LrcError, UsageError

Json = dict[str, Any]
MLP = "tiny:mlp_with_inputs"


def mlp_spec(folder: Path, **sections: Any) -> Path:
    """A spec of the perceptron, with its data beside it."""
    tiny.write_data(folder)
    document = tiny.factorize(solver="kfac", rank={"params_kept": 0.6})
    document |= {"model": {"path": MLP}, "calibration": {"dataset": "arrays.npz", "samples": 48}, **sections}
    path = folder / "spec.yaml"
    path.write_text(json.dumps(document))  # YAML takes JSON
    return path


@pytest.fixture
def job(tmp_path: Path, checked_here: None) -> Callable[..., Finished]:
    """A function that runs the job on the perceptron into `out`."""

    def run(output: str = "out", *, model: str | None = None, cache: Path | None = None, overwrite: bool = False,
            **sections: Any) -> Finished:  # fmt: skip
        spec = mlp_spec(tmp_path, **sections)
        return compile_to_folder(
            model, spec, output=tmp_path / output, cache=cache, overwrite=overwrite, allow_code=True
        )  # fmt: skip

    return run


def files_of(folder: Path) -> list[str]:
    return sorted(tiny.state_of(folder))


def strings_of(data: Any) -> Iterator[str]:
    """Every key and every string in JSON data."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key)
            yield from strings_of(value)
    elif isinstance(data, list):
        for value in data:
            yield from strings_of(value)
    elif isinstance(data, str):
        yield data


# What is left.


def test_the_folder_holds_what_the_conventions_say(finished: Finished) -> None:
    assert files_of(finished.path) == [
        "README.md", "config.json",
        "lrc/exports/hf.json", "lrc/exports/onnx.json", "lrc/exports/pt2.json",
        "lrc/manifest.json", "lrc/metrics.json", "lrc/plan.json", "lrc/report.html", "lrc/spec.resolved.yaml", "lrc/spec.yaml",
        "model.safetensors", "onnx/model.onnx", "program.pt2", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_nothing_else_is_left_beside_it_but_the_cache(finished: Finished) -> None:
    assert sorted(path.name for path in finished.path.parent.iterdir()) == [".lrc-cache", "out"]


def test_the_manifest_tells_what_a_repetition_needs(finished: Finished) -> None:
    manifest = json.loads((finished.path / "lrc" / "manifest.json").read_text())
    assert set(manifest) == {
        "format", "model", "task", "environment", "seed", "artifacts", "parity", "failures", "training", "sha256", "seconds",
        "peak_memory",
    }  # fmt: skip
    assert manifest["task"] == "sentence-similarity"
    assert manifest["failures"] == []
    assert {row["format"] for row in manifest["parity"]} == {"hf", "onnx", "pt2"}
    assert all(row["ok"] for row in manifest["parity"])
    assert manifest["environment"]["versions"]["lrc-compiler"] == lrc.__version__
    assert {"passes", "export hf", "export onnx", "verify", "evaluate"} <= set(manifest["seconds"])


def test_the_manifest_has_the_hash_of_every_file_but_its_own(finished: Finished) -> None:
    from lrc.run.output import sha256

    hashes = json.loads((finished.path / "lrc" / "manifest.json").read_text())["sha256"]
    assert sorted([*hashes, "lrc/manifest.json"]) == files_of(finished.path)
    assert hashes == {name: sha256(finished.path / name) for name in hashes}


def test_no_file_tells_of_the_machine(finished: Finished, bert: Path, data: Path) -> None:
    private = [str(bert), str(data), str(finished.path), str(Path.home()), socket.gethostname(), "site-packages", "/work/"]
    private = [word for word in private if len(word) > 3 and word != "/root"] + [f"/{getpass.getuser()}/"]
    for name, content in tiny.state_of(finished.path).items():
        found = [word for word in private if word.encode() in content]
        assert not found, f"{name} holds {found}"


def test_no_json_holds_an_absolute_path(finished: Finished) -> None:
    for name in files_of(finished.path):
        if name.endswith(".json") and name != "tokenizer.json":
            words = strings_of(json.loads((finished.path / name).read_text()))
            assert not [word for word in words if re.match(r"/\w|[A-Z]:\\", word)], name


def test_times_stand_in_the_manifest_alone(job: Callable[..., Finished], tmp_path: Path) -> None:
    """So two runs leave the same bytes everywhere else, whatever their cache and folder are called."""
    export = [{"format": "pt2"}]
    a = tiny.state_of(job("a", cache=tmp_path / "first", export=export).path)
    b = tiny.state_of(job("b", cache=tmp_path / "second", export=export).path)
    assert set(a) == set(b)
    different = {name for name in a if a[name] != b[name]}
    assert different == {"lrc/manifest.json"}
    kept = [json.loads(files["lrc/manifest.json"]) for files in (a, b)]
    for manifest in kept:
        del manifest["seconds"], manifest["peak_memory"]
    assert kept[0] == kept[1]


def test_the_specs_are_the_given_one_and_the_whole_one(finished: Finished, spec: Path) -> None:
    from lrc.spec.load import load_document

    inside = finished.path / "lrc"
    assert (inside / "spec.yaml").read_text() == spec.read_text()
    resolved, _ = load_document(inside / "spec.resolved.yaml")
    given, _ = load_document(spec)
    assert resolved.model_copy(update={"output": "out"}) == given


def test_metrics_and_gates_are_written(finished: Finished) -> None:
    found = json.loads((finished.path / "lrc" / "metrics.json").read_text())
    (metric,) = found["metrics"]
    assert metric["metric"] == "spearman"
    assert -1 <= metric["value"] <= 1
    assert metric["gain"] == pytest.approx((metric["value"] - metric["original"]) / abs(metric["original"]))
    assert [gate["gate"] for gate in found["gates"]] == ["max_degradation of spearman"]


def test_a_form_that_can_be_loaded_is_always_written(job: Callable[..., Finished]) -> None:
    assert "program.pt2" in files_of(job(export=[]).path)


# Checks that fail.


def test_a_check_that_cannot_be_made_keeps_the_result_and_fails(job: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    done = job(evaluate={"metrics": ["accuracy"], "dataset": "broken.npz"})
    assert "program.pt2" in files_of(done.path)
    (failure,) = json.loads((done.path / "lrc" / "manifest.json").read_text())["failures"]
    assert "broken.npz" in failure
    with pytest.raises(LrcError, match=r"the result was written, but a check failed: .*broken\.npz") as caught:
        done.raise_on_failure()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("evaluate", "place"),
    [
        ({"metrics": ["accuracy"], "dataset": "nowhere.npz"}, r"evaluate\.dataset"),
        ({"metrics": [{"type": "accuracy", "dataset": "nowhere.npz"}]}, r"evaluate\.metrics\.0\.dataset"),
    ],
)
def test_missing_evaluation_data_is_noticed_before_any_work(
    job: Callable[..., Finished], tmp_path: Path, evaluate: dict[str, Any], place: str
) -> None:
    with pytest.raises(UsageError, match=place + r": .*nowhere\.npz: no such file"):
        job(evaluate=evaluate)
    assert not list(tmp_path.glob("**/program.pt2"))


def test_a_missed_gate_keeps_the_result_and_is_told_apart(job: Callable[..., Finished], tmp_path: Path) -> None:
    import numpy as np

    x = tiny.mlp_inputs(32)
    labels = tiny.mlp()(x).argmax(-1).numpy()
    np.savez(tmp_path / "labelled.npz", x=x.numpy(), labels=labels)
    evaluate = {"metrics": ["accuracy"], "dataset": "labelled.npz", "gates": {"at_least": {"accuracy": 1.01}}}
    done = job(evaluate=evaluate)
    assert "program.pt2" in files_of(done.path)
    with pytest.raises(GateError, match=r"at_least accuracy expected >= 1\.01, got ") as caught:
        done.raise_on_failure()
    assert caught.value.exit_code == 3
    assert done.record.metrics[0]["original"] == 1.0


def test_an_artifact_that_does_not_open_keeps_the_result_and_fails(
    job: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise LowerError("pt2", message="the artifact does not run in a fresh process")

    monkeypatch.setattr("lrc.run.job.check", broken)
    done = job()
    assert done.record.failures == ["pt2: the artifact does not run in a fresh process."]
    assert "program.pt2" in files_of(done.path)


def test_a_check_that_breaks_in_any_way_keeps_the_result(job: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lrc.run.job.evaluate", broken)
    done = job(evaluate={"metrics": ["accuracy"], "dataset": "arrays.npz"})
    assert done.record.failures == ["evaluate: ZeroDivisionError: division by zero"]
    assert "program.pt2" in files_of(done.path)


# Refusals before any work.


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a model is captured."""
    monkeypatch.setattr("lrc.run.prepare.capture", lambda *_, **__: pytest.fail("the model was loaded"))


def test_a_folder_with_files_is_refused_before_any_work(job: Callable[..., Finished], tmp_path: Path, no_work: None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="expected an empty or absent output folder, got files in it"):
            job(overwrite=overwrite)
    assert files_of(tmp_path / "out") == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    job: Callable[..., Finished], no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="is not writable"):
        job()


def test_missing_calibration_data_is_refused_before_any_work(
    job: Callable[..., Finished], tmp_path: Path, no_work: None
) -> None:
    with pytest.raises(UsageError, match=r"calibration\.dataset: .*nowhere\.npz: no such file"):
        job(calibration={"dataset": "nowhere.npz"})
    assert not (tmp_path / "out").exists()


def test_a_finished_output_is_replaced_only_when_asked(job: Callable[..., Finished]) -> None:
    first = tiny.state_of(job().path)
    with pytest.raises(UsageError, match="Add `--overwrite` to replace it"):
        job()
    again = job(passes=[{"type": "factorize", "solver": "svd", "rank": 2}], overwrite=True)
    assert json.loads((again.path / "lrc" / "plan.json").read_text())["decisions"][0]["rank"] == 2
    assert first["lrc/plan.json"] != tiny.state_of(again.path)["lrc/plan.json"]


def test_inputs_are_not_touched(finished: Finished, bert: Path, data: Path, tmp_path: Path) -> None:
    assert tiny.state_of(bert) == tiny.state_of(tiny.write_bert(tmp_path / "again"))
    (tmp_path / "data").mkdir()
    assert tiny.state_of(data) == {**tiny.state_of(tiny.write_data(tmp_path / "data")), "spec.yaml": tiny.SPEC.encode()}


def test_runs_with_two_models_share_a_cache_and_no_entry(job: Callable[..., Finished], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    for name in ("mlp_with_inputs", "other_mlp_with_inputs"):
        alone = job(f"{name}-alone", model=f"tiny:{name}", cache=tmp_path / f"{name}-cache")
        together = job(f"{name}-together", model=f"tiny:{name}", cache=shared)
        assert tiny.state_of(alone.path)["program.pt2"] == tiny.state_of(together.path)["program.pt2"]
        assert (alone.path / "lrc/plan.json").read_bytes() == (together.path / "lrc/plan.json").read_bytes()


# A full disk.


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def nothing_half_written(folder: Path) -> bool:
    """Say whether only finished steps are left, in the documented place."""
    left = folder / ".out.partial"
    journal = json.loads((left / "journal.json").read_text())["done"] if (left / "journal.json").is_file() else {}
    promised = {name for files in journal.values() for name in files} | ({"journal.json"} if journal else set())
    return not (folder / "out").exists() and set(files_of(left)) == promised


@pytest.mark.parametrize("writer", ["torch.export.save", "lrc.run.job.dump"])
def test_a_full_disk_leaves_nothing_half_written_and_the_same_command_finishes(
    writer: str, job: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = tiny.state_of(job("undisturbed").path)
    with monkeypatch.context() as patch:
        patch.setattr(writer, no_space)
        with pytest.raises(LowerError, match=r"the disk is full .*Free some space and run the same command again") as caught:
            job()
    assert caught.value.exit_code == 1
    assert nothing_half_written(tmp_path)
    again = tiny.state_of(job().path)
    assert again["program.pt2"] == undisturbed["program.pt2"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".lrc-cache"]


def test_a_full_disk_under_the_cache_is_said_with_the_remedy(
    job: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.measure.cache._write_atomically", no_space)
    with pytest.raises(LrcError, match=r"the cache cannot be written: No space left on device\. Free some space"):
        job()
    assert nothing_half_written(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 kB; skipped where none may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"skipped: no file system may be mounted here ({made.stderr.strip()})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_really_full_disk_is_said_and_with_space_the_same_command_finishes(
    job: Callable[..., Finished], tmp_path: Path, small_disk: Path
) -> None:
    with pytest.raises(LowerError, match="the disk is full"):
        job("small/out", cache=tmp_path / "cache")
    assert nothing_half_written(small_disk)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = job("small/out", cache=tmp_path / "cache")
    assert "program.pt2" in files_of(done.path)
    assert [path.name for path in small_disk.iterdir()] == ["out"]


# Runs that are killed.


class Forks:
    """The command line in forked children (see `forks.py`)."""

    def __init__(self, *modes: str) -> None:
        script = Path(__file__).with_name("forks.py")
        path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(script), *modes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self.answer() == {"ready": True}

    def answer(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended"
        found: Json = json.loads(line)
        return found

    def run(self, argv: list[str], cwd: Path, log: Path, *, after: float | None = None, sign: int = signal.SIGKILL) -> Json:
        """Run the command; return its exit code, its seconds and what it said. `after` so many seconds it gets a signal."""
        assert self.process.stdin is not None
        order = {"argv": argv, "cwd": str(cwd), "signal": int(sign), "after": after, "log": str(log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return {**self.answer(), "said": log.read_text()}

    def end(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """For the perceptron."""
    made = Forks()
    yield made
    made.end()


@pytest.fixture
def text_forks() -> Iterator[Forks]:
    """For an encoder and its ONNX file."""
    made = Forks("text")
    yield made
    made.end()


def assert_resumes(forks: Forks, command: list[str], folder: Path, results: list[str], kills: int) -> None:
    """Kill the command at random moments, one after the other, then let it finish: the files are those of a calm run."""
    (folder / "calm").mkdir()
    (folder / "killed").mkdir()
    log = folder / "log"
    calm = forks.run(command, folder / "calm", log)
    assert calm["code"] == 0, calm["said"]
    generator = random.Random(0)
    killed = 0
    for _ in range(kills):
        made = forks.run(command, folder / "killed", log, after=generator.uniform(0.05, 0.8) * calm["seconds"])
        if made["code"] == 0:  # it was finished before its time
            break
        assert made["code"] == -signal.SIGKILL, made["said"]
        killed += 1
        assert {path.name for path in (folder / "killed").iterdir()} <= {".lrc-cache", ".out.partial", ".out.lock"}
    assert killed > 0
    last = forks.run(command, folder / "killed", log) if not (folder / "killed" / "out").exists() else made
    assert last["code"] == 0, last["said"]
    one, two = (tiny.state_of(folder / name / "out") for name in ("calm", "killed"))
    assert set(one) == set(two)
    assert {name: one[name] == two[name] for name in results} == dict.fromkeys(results, True)
    assert sorted(path.name for path in (folder / "killed").iterdir()) == [".lrc-cache", "out"]


def test_a_killed_run_is_taken_over_and_leaves_the_same_bytes(forks: Forks, tmp_path: Path) -> None:
    spec = mlp_spec(tmp_path)
    before = tiny.state_of(tmp_path)
    command = ["compile", str(spec), "-o", "out", "--allow-code"]
    assert_resumes(forks, command, tmp_path, ["program.pt2", "lrc/plan.json", "lrc/spec.resolved.yaml"], 4)
    assert {name: tiny.state_of(tmp_path)[name] for name in before} == before


@pytest.mark.slow
def test_a_killed_run_on_an_encoder_leaves_the_same_bytes(text_forks: Forks, bert: Path, spec: Path, tmp_path: Path) -> None:
    before = tiny.state_of(bert)
    command = ["compile", str(spec), str(bert), "-o", "out"]
    assert_resumes(text_forks, command, tmp_path, ["model.safetensors", "lrc/plan.json", "onnx/model.onnx", "program.pt2"], 6)
    assert tiny.state_of(bert) == before


def test_an_interrupted_run_says_one_line_and_can_be_taken_up(forks: Forks, tmp_path: Path) -> None:
    spec = mlp_spec(tmp_path)
    command = ["compile", str(spec), "-o", "out", "--allow-code"]
    for after in (0.1, 0.2):
        made = forks.run(command, tmp_path, tmp_path / "log", after=after, sign=signal.SIGINT)
        if made["code"] == 0:  # on a busy machine the signal may come when all is done
            shutil.rmtree(tmp_path / "out")
            continue
        assert made["code"] == 1
        assert made["said"] == "error: interrupted: nothing was half-written; the same command takes over what was finished\n"
        assert not (tmp_path / "out").exists()
    assert forks.run(command, tmp_path, tmp_path / "log")["code"] == 0
    assert "program.pt2" in files_of(tmp_path / "out")
