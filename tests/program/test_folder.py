"""Bad models: each is one error of the right class, with the place and what to do, and nothing in the file runs."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Captured
from safetensors.torch import load_file, save_file

from lrc.errors import CaptureError, LrcError, ModelError, UsageError
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.folder import check_weights, read_config
from lrc.program.source import Source, load_program, resolve_folder

Get = Callable[[str], Captured]


def error_of(path: object, kind: type[LrcError], **options: Any) -> LrcError:
    """Load a model that cannot be loaded and return the error: of the right class, with a place and a remedy."""
    with pytest.raises(LrcError) as caught:
        load_program(Source(str(path), **options))
    error = caught.value
    assert type(error) is kind
    assert error.where
    assert "\n" not in str(error)
    return error


@pytest.fixture
def folder(tmp_path: Path, captured: Get) -> Path:
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(captured("bert").folder, tmp_path / "model"))


@pytest.fixture
def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


# Folders.


def test_a_missing_folder_is_named_with_what_a_model_may_be(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "no such folder"):
        error = error_of(path, ModelError)
        assert error.where == str(path)
        assert error.expected == "a Hugging Face folder, a hub id, pkg://package/dir, module:factory or a .pt2 file"
        assert error.hint == "Check the path"
    with pytest.raises(ModelError, match=r"nothing: no such folder. Name a Hugging Face folder, or download one first"):
        read_config(tmp_path / "nothing")


def test_a_folder_without_a_config_says_what_it_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = error_of(folder, ModelError)
    assert (error.where, error.expected) == (str(folder), "a Hugging Face folder with `config.json`")
    assert "model.safetensors" in error.got
    for path in folder.iterdir():
        path.unlink()
    assert error_of(folder, ModelError).got == "nothing"


@pytest.mark.parametrize(("text", "expected"), [("{", "JSON"), ("", "JSON"), ("[1]", "a JSON object"), ("\udcff", "JSON")])
def test_a_config_that_is_no_json_object_is_refused(text: str, expected: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    error = error_of(folder, ModelError)
    assert (error.where, error.expected) == (str(folder / "config.json"), expected)


@pytest.mark.parametrize("kind", ["nonsense", None, 3, {"a": 1}])
def test_a_model_type_that_is_none_is_refused(kind: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    for weights in (True, False):
        with pytest.raises(ModelError, match=f"^{folder}: transformers cannot load the folder"):
            load_program(Source(str(folder)), weights=weights)


def test_missing_weights_are_named(folder: Path, weights: Path) -> None:
    weights.unlink()
    error = error_of(folder, ModelError)
    assert (error.where, error.expected, error.got) == (str(folder), "model.safetensors", "no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_never_loaded(name: str, folder: Path, weights: Path, tmp_path: Path) -> None:
    weights.unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    error = error_of(folder, ModelError)
    assert error.got == f"{name}, a pickle that could run code"
    assert error.hint.startswith("Convert it")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "header"])
def test_damaged_weights_are_refused(damage: str, folder: Path, weights: Path) -> None:
    data = weights.read_bytes()
    weights.write_bytes(
        {"cut": data[:-10], "garbage": b"\x00garbage" * 50, "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage]
    )
    error = error_of(folder, ModelError)
    assert error.where == str(weights)
    assert error.message.startswith(f"the file is damaged or cut short ({weights.stat().st_size} bytes")


def test_a_tensor_that_the_model_needs_and_the_file_lacks_is_named(folder: Path, weights: Path) -> None:
    state = load_file(weights)
    state.pop("encoder.layer.0.attention.self.query.weight")
    save_file(state, weights, metadata={"format": "pt"})
    error = error_of(folder, ModelError)
    assert error.message == "the weights lack 1 tensors, first 'encoder.layer.0.attention.self.query.weight'"


def test_a_tensor_of_another_shape_is_refused(folder: Path, weights: Path) -> None:
    state = load_file(weights)
    state["pooler.dense.weight"] = torch.zeros(3, 3)
    save_file(state, weights, metadata={"format": "pt"})
    error = error_of(folder, ModelError)
    assert error.where == str(folder)
    assert "transformers cannot load the folder" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_by_tensor(value: float, folder: Path, weights: Path) -> None:
    state = load_file(weights)
    state["encoder.layer.0.output.dense.weight"][2, 3] = value
    state["pooler.dense.bias"][:] = value
    save_file(state, weights, metadata={"format": "pt"})
    error = error_of(folder, ModelError)
    assert error.where == f"{folder}: encoder.layer.0.output.dense.weight"
    assert error.got == f"1 of {16 * 24} that are NaN or infinite"


# The index of shards.


def sharded(folder: Path, weight_map: object) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x", "C:x"])
def test_an_index_that_points_outside_the_folder_is_refused(name: str, folder: Path) -> None:
    index = sharded(folder, {"pooler.dense.bias": name})
    error = error_of(folder, ModelError)
    assert error.where == str(index)
    assert error.message == f"the index points outside the folder: {name!r}"


@pytest.mark.parametrize("weight_map", [{"pooler.dense.bias": 3}, ["model.safetensors"], "model.safetensors", None])
def test_an_index_of_another_form_is_refused(weight_map: object, folder: Path) -> None:
    index = sharded(folder, weight_map)
    error = error_of(folder, ModelError)
    assert (error.where, error.expected) == (str(index), "a `weight_map` of tensor names to file names")


def test_an_index_whose_shard_or_tensor_is_missing_is_refused(folder: Path) -> None:
    sharded(folder, {"pooler.dense.bias": "model-2.safetensors"})
    error = error_of(folder, ModelError)
    assert (error.where, error.message) == (str(folder / "model-2.safetensors"), "the file is missing")
    index = sharded(folder, {"no.such.tensor": "model.safetensors"})
    error = error_of(folder, ModelError)
    assert (error.where, error.message) == (
        str(index),
        "model.safetensors lacks the tensor 'no.such.tensor' that the index promises",
    )


def test_a_whole_index_is_read(folder: Path, weights: Path) -> None:
    state = load_file(weights)
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, part in parts.items():
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
    weights.unlink()
    sharded(folder, {key: name for name, part in parts.items() for key in part})
    assert check_weights(folder) == [folder / "a.safetensors", folder / "b.safetensors"]
    program = load_program(Source(str(folder)))
    assert torch.equal(program.tensors()["pooler.dense.bias"], state["pooler.dense.bias"])


# Where a model is.


def test_a_package_that_is_not_installed_is_named_with_its_pip_line() -> None:
    for path in ("pkg://lrc_no_such_package/model", "pkg://", "pkg://a-b/model", "pkg://lrc.nothing/model"):
        error = error_of(path, ModelError)
        assert (error.where, error.message) == (path, f"the package {path[6:].partition('/')[0]!r} is not installed")
    assert error_of("pkg://lrc_no_such_package/model", ModelError).hint == "pip install --no-deps lrc-no-such-package"


def test_a_package_path_stays_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lrc_test_package"
    (package / "small").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the code of a package is not run')")
    (tmp_path / "outside").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_folder(Source("pkg://lrc_test_package/small")) == (package / "small").resolve()
    for inside in ("../outside", "small/../../outside", "/etc"):
        assert error_of(f"pkg://lrc_test_package/{inside}", ModelError).message == "the path leaves the package"
    (package / "link").symlink_to(tmp_path / "outside")
    assert error_of("pkg://lrc_test_package/link", ModelError).message == "the path leaves the package"
    error = error_of("pkg://lrc_test_package/large", ModelError)
    assert error.message == "the package has no folder 'large'; it has: link, small"


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read once, when huggingface_hub is imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = error_of("nobody/no-such-model", ModelError)
    assert error.where == "nobody/no-such-model"
    assert error.message.startswith("no such folder, not in the local hub cache, and the hub cannot be reached")
    assert "offline, name a folder" in error.hint


def test_a_hub_id_in_the_cache_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captured: Get) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(captured("bert").folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert resolve_folder(Source("someone/tiny")) == snapshot


def test_an_unknown_task_lists_the_known_ones(folder: Path) -> None:
    error = error_of(folder, UsageError, task="text-regeneration")
    assert (error.where, error.got) == ("model.task", "text-regeneration")
    assert "text-generation" in error.expected
    assert error.exit_code == 2


def test_a_task_that_the_weights_were_not_trained_for_is_refused(folder: Path, captured: Get) -> None:
    error = error_of(folder, ModelError, task="fill-mask")
    assert error.message.startswith("the weights lack ")
    assert "name the `task` that it was trained for" in error.hint
    error = error_of(captured("vit").folder, ModelError, task="text-generation")
    assert error.message.startswith("transformers cannot load the folder: Unrecognized configuration class")
    with pytest.raises(ModelError, match="Unrecognized configuration class"):
        load_program(Source(str(captured("vit").folder), task="text-generation"), weights=False)
    assert error.hint == "Is `model.task: text-generation` right? The config names ['ViTForImageClassification']"


# Exported programs.


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good program file with a constant, a symbolic size and example inputs."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.fc(x) * torch.tensor([1.0, 2.0, 3.0])] * 2)

    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    torch.export.save(capture_module(Net(), torch.randn(2, 4)).export(), path)
    return path


def edited(exported: Path, target: Path, edit: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    """Copy a program file with other contents of some members."""
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
        root = old.namelist()[0].partition("/")[0]
        for name, data in (extra or {}).items():
            new.writestr(f"{root}/{name}", data)
    return target


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_good_program_file_is_read(exported: Path) -> None:
    program = load_program(Source(str(exported)))
    assert isinstance(program, Program)
    assert list(program.sites) == ["fc"]


def test_a_missing_program_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "model.pt2", ModelError).message == "no such file"


def test_a_file_that_is_no_program_is_refused(tmp_path: Path, exported: Path) -> None:
    path = tmp_path / "model.pt2"
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    for data in (b"", b"garbage" * 100, exported.read_bytes()[:-300], pickle.dumps([1, 2]), empty.getvalue()):
        path.write_bytes(data)
        error = error_of(path, CaptureError)
        assert (error.where, error.expected) == (str(path), "a program saved by torch.export.save")


def test_a_program_whose_json_is_damaged_is_refused(tmp_path: Path, exported: Path) -> None:
    for name, data in (("_config.json", b"{"), ("models/model.json", b"[]"), ("models/model.json", b'{"graph_module": 3}')):
        path = edited(exported, tmp_path / "model.pt2", lambda n, d, name=name, data=data: data if n.endswith(name) else d)
        assert error_of(path, CaptureError).expected == "a program saved by torch.export.save"


@pytest.mark.parametrize("member", ["weights", "constants"])
def test_pickled_weights_and_constants_are_refused_unread(member: str, tmp_path: Path, exported: Path) -> None:
    def edit(name: str, data: bytes) -> bytes:
        if name.endswith(f"model_{member}_config.json"):
            entry = {"path_name": "tensor_0", "is_param": True, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"fc.weight": entry}}).encode()
        return data

    extra = {f"data/{member}/tensor_0": pickled(Canary(tmp_path / "ran"))}
    path = edited(exported, tmp_path / "model.pt2", edit, extra)
    error = error_of(path, CaptureError)
    assert error.message == "the file holds pickled objects (tensor_0), which could run code"
    assert error.hint.startswith("Save the program again with plain tensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["data/weights/model.pt", "data/constants/model.pt", "data/constants/opaque_obj_0", "data/constants/custom_obj_0"]
)
def test_pickles_in_older_places_are_refused_unread(name: str, tmp_path: Path, exported: Path) -> None:
    extra = {name: pickled(Canary(tmp_path / "ran"))}
    error = error_of(edited(exported, tmp_path / "model.pt2", lambda _, data: data, extra), CaptureError)
    assert "the file holds pickled objects" in error.message
    assert not (tmp_path / "ran").exists()


def test_pickled_example_inputs_are_refused_unread(tmp_path: Path, exported: Path) -> None:
    """torch.export.load tries `weights_only` first, and then loads them all the same."""
    bad = pickled(((), {"x": Canary(tmp_path / "ran")}))
    path = edited(exported, tmp_path / "model.pt2", lambda name, data: bad if "sample_inputs" in name else data)
    error = error_of(path, CaptureError)
    assert "/data/sample_inputs/model.pt), which could run code" in error.message
    assert not (tmp_path / "ran").exists()


def test_members_that_torch_could_take_for_others_are_refused(tmp_path: Path, exported: Path) -> None:
    for name in ("models/MODEL.json", "DATA/weights/Model_Weights_Config.json"):
        path = edited(exported, tmp_path / "model.pt2", lambda _, data: data, {name: b"{}"})
        assert error_of(path, CaptureError).message.startswith("the file holds two members of the name")


def test_native_code_in_a_program_file_is_refused(tmp_path: Path, exported: Path) -> None:
    path = edited(exported, tmp_path / "model.pt2", lambda _, data: data, {"data/aotinductor/model/m.so": b"\x7fELF"})
    assert "native code (model/data/aotinductor/model/m.so)" in error_of(path, CaptureError).message


def test_a_program_in_the_format_of_old_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.0")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", pickled(Canary(tmp_path / "ran")))
    assert "a program in a format of old" in error_of(path, CaptureError).message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('{}').touch()",
        'Max(\'__import__("pathlib").Path("{}").touch()\', 2)',
        "eval(\"open('{}', 'w')\")",
        "[open(x, 'w') for x in ['{}']][0]",
        "Symbol('s0').__class__",
        "exec",
        "Symbol('s0', ",
    ],
)
def test_sizes_are_arithmetic_and_never_code(code: str, tmp_path: Path, exported: Path) -> None:
    """torch hands these texts to sympy, which evaluates them as Python."""

    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        text = data.decode()
        start = text.index('"expr_str": ') + len('"expr_str": ')
        end = text.index('", "hint"', start) + 1
        return (text[:start] + json.dumps(code.format(tmp_path / "ran")) + text[end:]).encode()

    path = edited(exported, tmp_path / "model.pt2", edit)
    if code == "exec":  # a word alone calls nothing; torch finds that it is no size
        assert error_of(path, CaptureError).expected == "a program saved by torch.export.save"
    else:
        assert "an expression that is none of a size" in error_of(path, CaptureError).message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("old", ['"name": "x"', '"parameter_name": "fc.weight"', r"\\\"x\\\"", '"forward_arg_names": ["x"'])
def test_names_in_a_program_file_are_names(old: str, tmp_path: Path, exported: Path) -> None:
    """torch writes Python with these names in it, and runs that."""
    with zipfile.ZipFile(exported) as archive:
        text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("models/model.json"))
    assert old in text
    bad = old.replace("x", "x=print(1)").replace("fc.weight", "fc.weight, print(1)")
    path = edited(
        exported, tmp_path / "model.pt2",
        lambda name, data: data.replace(old.encode(), bad.encode()) if name.endswith("models/model.json") else data,
    )  # fmt: skip
    assert "a name that is none" in error_of(path, CaptureError).message
