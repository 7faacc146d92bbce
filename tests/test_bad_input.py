"""Whatever a user gives: one clear line, the documented exit code, nothing left behind, and the inputs as they were."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Run = tiny.Run
LEFT = {".lrc-cache", ".out.partial"}  # what a run that did not finish may leave beside its output
Refuse = Callable[..., str]


class Branching(nn.Module):
    """A module whose control flow depends on values: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.sum() > 0:  # the line that the message names
            return y
        return -y


def branching() -> tuple[nn.Module, dict[str, Tensor]]:
    return Branching(), {"x": tiny.mlp_inputs()}


def failing() -> nn.Module:
    raise RuntimeError("the weights are in the other building")


def no_module() -> str:
    return "a model"


@pytest.fixture(autouse=True)
def _here(in_tmp: Path) -> None:
    """Run in an empty folder with the data of the perceptron."""
    tiny.write_data(in_tmp)


@pytest.fixture
def refuse(cli: Run, in_tmp: Path) -> Refuse:
    """A function that runs `lrc` on something bad, checks what every refusal has in common, and returns its one line."""

    def own_files() -> dict[str, bytes]:
        return {name: text for name, text in tiny.state_of(in_tmp).items() if name.split("/")[0] not in LEFT}

    def run(code: int, *arguments: object) -> str:
        before = own_files()
        made = cli(*arguments)
        assert made.code == code, made
        assert "Traceback" not in made.err
        assert made.out == ""
        assert own_files() == before
        assert {path.name for path in in_tmp.iterdir()} <= LEFT | {name.split("/")[0] for name in before}
        return made.error

    return run


def spec_file(text: str, name: str = "spec.yaml") -> str:
    Path(name).write_text(text)
    return name


def mlp_spec(**sections: Any) -> str:
    document = tiny.factorize(solver="kfac", rank=3)
    document |= {"calibration": {"dataset": "arrays.npz"}, "export": [{"format": "pt2"}], **sections}
    return spec_file(json.dumps(document))


def compile_mlp(**sections: Any) -> list[str]:
    return ["compile", mlp_spec(**sections), "tiny:mlp_with_inputs", "--allow-code", "-o", "out"]


def compile_folder(folder: Path, **sections: Any) -> list[str]:
    document = tiny.factorize(targets=[tiny.LAYERS], rank=3) | {"export": [{"format": "hf"}], **sections}
    return ["compile", spec_file(json.dumps(document)), str(folder), "-o", "out"]


# The spec.


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "version: 1\npasses:\n  - type: factorize\n    rank: 4\n    slover: svd\n",
            "spec.yaml:5: passes.0.slover: unknown key `slover`; did you mean `solver`?",
        ),
        (
            "version: 1\ncalibraton: {dataset: a.txt}\n",
            "spec.yaml:2: calibraton: unknown key `calibraton`; did you mean `calibration`?",
        ),
        (
            "version: 1\npasses: [{type: factorize, rank: four}]\n",
            "spec.yaml:2: passes.0.rank: expected a whole number or exactly one of {",
        ),
        (
            "version: 1\npasses: [{type: factorize, rank: 0.5}]\n",
            "spec.yaml:2: passes.0.rank: expected a whole number or exactly one of {",
        ),
        (
            "version: 1\ncalibration:\n  dataset: a.txt\n  samples: many\n",
            "spec.yaml:4: calibration.samples: input should be a valid integer, got 'many'",
        ),
        (
            "version: 1\npasses: [{type: factorize, rank: 4, optional: yes}]\n",
            "spec.yaml:2: passes.0.optional: input should be a valid boolean, got 'yes'",
        ),
        ("version: 1\npasses: [{type: factorise}]\n", "spec.yaml:2: passes.0: unknown pass 'factorise'; known: "),
        ("version: 1\npasses: [{type: factorize, rank: 4, solver: svdd}]\n", "spec.yaml:2: passes.0.solver: unknown solver"),
        ("version: 1\npasses: [{type: factorize, rank: 4,\n", "spec.yaml:3: expected YAML, got "),
        ("version: 1\n\tpasses: []\n", "spec.yaml:2: expected YAML, got found character '\\t' that cannot start any token."),
        ("version: 1\nversion: 1\n", "spec.yaml:2: the key `version` is given twice. Remove one."),
        ("- version: 1\n", "spec.yaml:1: expected a mapping of keys, got list. Start the file with `version: 1`."),
        ("", "spec.yaml:1: expected a mapping of keys, got an empty file. Start the file with `version: 1`."),
        ("passes: []\n", "spec.yaml:1: the key `version` is missing. Start the file with `version: 1`."),
        ("version: 2\n", "spec.yaml:1: version: input should be 1, got 2"),
        ("version: 1\npreset: kfacc\n", "spec.yaml:2: there is no preset 'kfacc'. Did you mean 'kfac'?"),
        ("version: 1\npasses: [{type: factorize, rank: 4, targets: ['a{b']}]\n", "spec.yaml:2: passes.0.targets: "),
        ("version: 1\npasses: [{type: factorize, rank: 4, targets: ['re:(']}]\n", "spec.yaml:2: passes.0.targets: "),
    ],
)
def test_a_bad_spec_names_file_line_key_and_remedy(text: str, wanted: str, refuse: Refuse) -> None:
    assert refuse(2, "compile", spec_file(text), "tiny:mlp_with_inputs", "-o", "out").startswith(wanted)


def test_a_spec_that_is_no_text_is_refused(refuse: Refuse) -> None:
    Path("spec.yaml").write_bytes(b"\xff\xfe\x00version")
    assert "the file cannot be read" in refuse(2, "compile", "spec.yaml", "tiny:mlp_with_inputs", "-o", "out")


def test_one_bad_value_does_not_hide_another_nor_cascade(cli: Run) -> None:
    text = "version: 1\ncalibration: {dataset: a.txt, samples: many}\npasses: [{type: factorize, rank: 4, slover: svd}]\n"
    made = cli("validate", spec_file(text))
    assert made.code == 2
    assert made.err.splitlines() == [
        "error: spec.yaml:2: calibration.samples: input should be a valid integer, got 'many'",
        "spec.yaml:3: passes.0.slover: unknown key `slover`; did you mean `solver`?",
    ]


def test_a_pattern_that_matches_nothing_names_sites(refuse: Refuse) -> None:
    passes = [{"type": "factorize", "solver": "svd", "rank": 3, "targets": ["encoder.**"]}]
    line = refuse(2, *compile_mlp(passes=passes))
    assert line.startswith(
        "spec.yaml: passes.0: pattern 'encoder.**' matches no site. The model has 3 sites (up, middle, down)"
    )


def test_a_rank_that_is_not_possible_names_the_site(refuse: Refuse) -> None:
    passes = [{"type": "factorize", "solver": "svd", "rank": 13}]
    line = refuse(2, *compile_mlp(passes=passes))
    assert line == (
        "up: expected rank <= 12 (min of in_features=12, out_features=20), got 13. "
        "Lower `rank`, or name the site under `ignore`."
    )


def test_an_override_that_leads_nowhere_is_refused(refuse: Refuse) -> None:
    line = refuse(2, *compile_mlp(), "nosuch.key=1")
    assert line.startswith("override 'nosuch.key=1': nosuch: unknown key `nosuch`; known: version, $schema, model, calibration")
    assert refuse(2, *compile_mlp(), "passes.0=").startswith("override 'passes.0=': passes.0: expected a pass")


# The model.


def test_a_model_that_is_nowhere_is_refused(refuse: Refuse) -> None:
    assert refuse(2, "compile", mlp_spec(), "-o", "out").startswith("MODEL: no model is named. Give MODEL, or set `model.path`")
    assert refuse(1, *compile_folder(Path("./nowhere"))).startswith("nowhere: ")
    assert "no such file" in refuse(1, *compile_folder(Path("nowhere.pt2")))
    assert "the package 'nowhere' is not installed" in refuse(1, *compile_folder("pkg://nowhere/model"))  # type: ignore[arg-type]


def test_code_runs_only_when_that_is_allowed(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "mlp_with_inputs", lambda: pytest.fail("it ran"))
    command = [word for word in compile_mlp() if word != "--allow-code"]
    assert refuse(2, *command) == "tiny:mlp_with_inputs: a factory runs code of yours. Add `--allow-code` to let it run."


@pytest.mark.parametrize(
    ("factory", "wanted"),
    [
        ("nowhere:make", "nowhere:make: No module named 'nowhere'. Is its folder on PYTHONPATH?"),
        ("tiny:nowhere", "tiny:nowhere: module 'tiny' has no attribute 'nowhere'"),
        ("test_bad_input:no_module", "test_bad_input:no_module: expected a torch.nn.Module, or one with its example inputs"),
        ("test_bad_input:failing", "test_bad_input:failing: the factory failed: RuntimeError: the weights are in the other"),
    ],
)
def test_a_factory_that_gives_no_module_is_refused(factory: str, wanted: str, refuse: Refuse) -> None:
    command = [factory if word == "tiny:mlp_with_inputs" else word for word in compile_mlp()]
    assert refuse(1, *command).startswith(wanted)


def test_a_model_that_torch_export_refuses_is_named_with_the_line(refuse: Refuse) -> None:
    command = ["test_bad_input:branching" if word == "tiny:mlp_with_inputs" else word for word in compile_mlp()]
    line = refuse(1, *command)
    assert line.startswith("Branching at test_bad_input.py:")
    assert "`if y.sum() > 0:" in line
    assert "torch.export refused the model: " in line
    assert "Rewrite that line without control flow that depends on values" in line


Damage = Callable[[Path], None]


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def pointing_at(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"pooler.dense.weight": name}}))

    return damage


def with_value(value: float) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["pooler.dense.weight"][2, 3] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def lacking_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "never_heard_of"}))


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (without("config.json"), "expected a Hugging Face folder with `config.json`, got model.safetensors, tokenizer.json"),
        (overwritten("config.json", b"{"), "config.json: expected JSON, got Expecting property name"),
        (overwritten("config.json", b"[]"), "config.json: expected a JSON object, got list"),
        (without("model.safetensors"), "expected model.safetensors, got no weights. Copy it there"),
        (only_a_pickle, "expected model.safetensors, got pytorch_model.bin, a pickle that could run code. Convert it"),
        (cut_short, "model.safetensors: the file is damaged or cut short ("),
        (overwritten("model.safetensors", b""), "model.safetensors: the file is damaged or cut short (0 bytes"),
        (overwritten("model.safetensors", b"no tensors at all"), "model.safetensors: the file is damaged or cut short ("),
        (pointing_at("../elsewhere.safetensors"), "the index points outside the folder: '../elsewhere.safetensors'"),
        (pointing_at("/etc/passwd"), "the index points outside the folder: '/etc/passwd'"),
        (pointing_at("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors: the file is missing"),
        (with_value(torch.nan), "pooler.dense.weight: expected finite numbers, got 1 of 1024 that are NaN or infinite"),
        (with_value(torch.inf), "pooler.dense.weight: expected finite numbers, got 1 of 1024 that are NaN or infinite"),
        (lacking_a_tensor, "the weights lack 1 tensors, first 'pooler.dense.weight'"),
        (of_unknown_type, "transformers cannot load the folder: "),
    ],
)
def test_a_damaged_folder_is_refused_by_name(damage: Damage, wanted: str, bert: Path, refuse: Refuse, in_tmp: Path) -> None:
    folder = tiny.copy_of(bert, in_tmp / "model")
    damage(folder)
    assert wanted in refuse(1, *compile_folder(folder))


def test_a_task_that_the_model_was_not_trained_for_is_refused(bert: Path, refuse: Refuse) -> None:
    line = refuse(1, *compile_folder(bert, model={"task": "text-classification"}))
    assert "the weights lack 2 tensors, first 'classifier.bias'" in line
    assert refuse(2, *compile_folder(bert, model={"task": "poetry"})).startswith("model.task: expected one of ")


def test_remote_code_runs_only_when_that_is_allowed(bert: Path, refuse: Refuse) -> None:
    line = refuse(2, *compile_folder(bert, model={"trust_remote_code": True}))
    assert line == "model.trust_remote_code: the model's own code would run. Add `--allow-code` if you trust it."


def test_a_damaged_program_is_refused(refuse: Refuse) -> None:
    Path("model.pt2").write_bytes(b"no archive")
    line = refuse(1, "compile", mlp_spec(), "model.pt2", "-o", "out")
    assert line.startswith("model.pt2: expected a program saved by torch.export.save, got a damaged or other file")


# The data.


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.txt", b"", "expected some text, got an empty file"),
        ("wrong.csv", b"name,age\nAda,36\n", "Set `text_column`"),
        ("broken.jsonl", b'{"text": "a cat"}\n{"text": \n', "broken.jsonl:2: expected one JSON object a line"),
        ("data.parquet", b"PAR1", "expected a .txt, .jsonl, .csv, .npz or .safetensors file, or module:factory, got .parquet"),
    ],
)
def test_bad_calibration_data_names_the_file_and_what_is_wrong_in_it(
    name: str, content: bytes, wanted: str, bert: Path, refuse: Refuse
) -> None:
    Path(name).write_bytes(content)
    passes = [{"type": "factorize", "targets": [tiny.LAYERS], "rank": 3}]
    line = refuse(2, *compile_folder(bert, passes=passes, calibration={"dataset": name}))
    assert name in line
    assert wanted in line


def test_arrays_with_other_names_or_sizes_are_refused(refuse: Refuse) -> None:
    np.savez("named.npz", y=np.zeros((4, 12), np.float32))
    assert "named.npz: expected arrays named x, got y" in refuse(2, *compile_mlp(calibration={"dataset": "named.npz"}))
    np.savez("ragged.npz", x=np.zeros((4, 12), np.float32), labels=np.zeros(3))
    line = refuse(2, *compile_mlp(calibration={"dataset": "ragged.npz"}))
    assert "ragged.npz: expected arrays with the same number of samples, got sizes [3, 4]" in line


def test_pickled_arrays_are_never_loaded(refuse: Refuse) -> None:
    np.savez("pickled.npz", x=np.array([{"a": 1}], dtype=object))
    assert "pickled.npz: the file is damaged or holds no arrays" in refuse(
        2, *compile_mlp(calibration={"dataset": "pickled.npz"})
    )


def test_a_text_that_is_too_short_for_one_window_is_refused(llama: Path, refuse: Refuse) -> None:
    Path("short.txt").write_text("the cat sings\n")
    passes = [{"type": "factorize", "targets": [tiny.LAYERS], "rank": 3}]
    line = refuse(2, *compile_folder(llama, passes=passes, calibration={"dataset": "short.txt", "max_length": 16}))
    assert line == "short.txt: expected at least 16 tokens, got 3. Lower `max_length`."


def test_a_missing_calibration_section_is_refused_with_the_remedy(refuse: Refuse) -> None:
    document = tiny.factorize(solver="kfac", rank=3)
    line = refuse(2, "compile", spec_file(json.dumps(document)), "tiny:mlp_with_inputs", "--allow-code", "-o", "out")
    assert line.startswith("calibration: a pass needs sample inputs, and the spec has no `calibration`. Add `calibration:")


def test_calibration_inputs_of_the_wrong_shape_name_what_does_not_fit(refuse: Refuse) -> None:
    np.savez("wide.npz", x=np.zeros((8, 13), np.float32))
    line = refuse(2, *compile_mlp(calibration={"dataset": "wide.npz"}))
    assert line.startswith("calibration: the model does not run on this data: The size of tensor a (12) must match")
    assert line.endswith("It takes x: [batch, 12].")


# The output.


def test_a_folder_with_files_and_a_file_in_the_way_are_refused(refuse: Refuse) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert "expected an empty or absent output folder, got files in it" in refuse(2, *compile_mlp())
    assert "expected an empty or absent output folder, got files in it" in refuse(2, *compile_mlp(), "--overwrite")
    shutil.rmtree("out")
    Path("out").write_text("mine")
    assert "expected a folder, got a file. Choose another output folder" in refuse(2, *compile_mlp())


def test_a_folder_that_cannot_be_written_is_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode, **k: allowed(path, mode, **k) and not mode & os.W_OK)
    assert "is not writable. Choose another output folder" in refuse(2, *compile_mlp())


def test_a_parent_that_no_folder_can_be_made_in_is_one_line(refuse: Refuse) -> None:
    command = compile_mlp()
    command[-1] = "/proc/lrc/out"
    assert refuse(1, *command).startswith("/proc/lrc: ")


def test_a_full_disk_is_one_line_and_the_same_command_finishes(
    refuse: Refuse, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.export.save", full)
        assert "the disk is full" in refuse(1, *compile_mlp())
    assert cli(*compile_mlp()).code == 0


def test_an_interrupt_is_one_line_and_the_same_command_finishes(
    refuse: Refuse, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See `tests/run/test_job.py` for a real SIGINT, and for kill -9."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("lrc.run.prepare.capture", "lrc.run.job.run_passes", "lrc.run.job.export_step", "lrc.run.job.write_last"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            line = refuse(1, *compile_mlp())
        assert line == "interrupted: nothing was half-written; the same command takes over what was finished"
    assert cli(*compile_mlp()).code == 0


# After the result is written.


def test_evaluation_data_that_is_missing_is_noticed_before_any_work(cli: Run) -> None:
    made = cli(*compile_mlp(evaluate={"metrics": ["accuracy"], "dataset": "nowhere.npz"}))
    assert made.code == 2
    assert "evaluate.dataset: nowhere.npz: no such file. Paths in a spec start at the spec's own folder" in made.error
    assert not Path("out").exists()


def test_evaluation_data_that_cannot_be_read_fails_and_keeps_the_result(cli: Run) -> None:
    Path("broken.npz").write_bytes(b"no archive")
    made = cli(*compile_mlp(evaluate={"metrics": ["accuracy"], "dataset": "broken.npz"}))
    assert made.code == 1
    assert "the result was written, but a check failed: broken.npz" in made.error
    assert Path("out/program.pt2").is_file()


def test_a_missed_gate_has_its_own_exit_code_and_keeps_the_result(cli: Run) -> None:
    x = tiny.mlp_inputs(32)
    np.savez("labelled.npz", x=x.numpy(), labels=tiny.mlp()(x).argmax(-1).numpy())
    gates = {"at_least": {"accuracy": 1.01}}
    made = cli(*compile_mlp(evaluate={"metrics": ["accuracy"], "dataset": "labelled.npz", "gates": gates}))
    assert made.code == 3
    assert "at_least accuracy expected >= 1.01, got " in made.error
    assert Path("out/program.pt2").is_file()


def test_the_models_and_data_of_the_session_are_as_they_were(bert: Path, llama: Path, tmp_path: Path) -> None:
    for folder, write in ((bert, tiny.write_bert), (llama, tiny.write_llama)):
        assert tiny.state_of(folder) == tiny.state_of(write(tmp_path / folder.name))
