"""Data files: what is read, and what is refused with the file, the line and what was found."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lrc.data import Batches, Request, batches_of, is_factory, load_batches
from lrc.data.files import need_columns, read_arrays, read_rows, read_text, text_column, texts_of
from lrc.errors import DataError, UsageError

INPUTS = ["input_ids", "attention_mask"]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_text_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    assert read_text(written(tmp_path / "a.txt", "héllo\n")) == "héllo\n"
    (tmp_path / "b.txt").write_bytes("\ufeffhéllo\r\n".encode())
    assert read_text(tmp_path / "b.txt") == "héllo\n"


@pytest.mark.parametrize("read", [read_text, read_rows, read_arrays])
def test_a_missing_file_is_refused(read: Any, tmp_path: Path) -> None:
    wanted = f"{tmp_path}/none.csv: no such file. Paths in a spec start at the spec's own folder."
    assert refusal(read, tmp_path / "none.csv") == wanted


@pytest.mark.parametrize("text", ["", "\n", "  \n\t\n"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_an_empty_file_is_refused(text: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"a{suffix}", text)
    read = read_text if suffix == ".txt" else read_rows
    assert refusal(read, path) == f"{path}: expected some text, got an empty file."


def test_a_file_that_is_not_utf_8_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("héllo".encode("latin-1"))
    assert refusal(read_text, tmp_path / "a.txt").startswith(
        f"{tmp_path}/a.txt: the file cannot be read as UTF-8 text: 'utf-8'"
    )
    assert refusal(read_text, tmp_path).startswith(f"{tmp_path}: the file cannot be read as UTF-8 text")


def test_a_csv_with_a_known_column_in_its_first_line_has_a_header(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "label, text\n0,one\n1,two\n")
    assert read_rows(path) == [{"label": "0", "text": "one"}, {"label": "1", "text": "two"}]
    other = written(tmp_path / "b.csv", "label,review\n0,one\n")
    assert read_rows(other, header="review") == [{"label": "0", "review": "one"}]
    assert read_rows(other, ("label", "score")) == [{"label": "0", "review": "one"}]


def test_a_csv_without_a_header_is_named_by_the_columns_asked_for_or_by_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "one,two,0.5\nthree,four,0.7\n")
    assert read_rows(path, ("sentence1", "sentence2", "score"))[1] == {
        "sentence1": "three",
        "sentence2": "four",
        "score": "0.7",
    }
    assert read_rows(path, ("left",))[0] == {"left": "one", "1": "two", "2": "0.5"}
    assert read_rows(path)[0] == {"0": "one", "1": "two", "2": "0.5"}


def test_a_header_with_a_byte_order_mark_is_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\none,1\n".encode())
    assert read_rows(tmp_path / "a.csv") == [{"text": "one", "label": "1"}]


@settings(max_examples=20, deadline=None)
@given(cells=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=1, max_size=4))
def test_csv_cells_come_back_as_they_were_written(cells: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([cell] for cell in cells)])
    assert [row["text"] for row in read_rows(path)] == cells


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4))
def test_json_lines_come_back_as_they_were_written(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    written(path, "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    assert [row["text"] for row in read_rows(path)] == texts


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "text,label\n", "a.csv: expected rows under the header, got none."),
        (
            "a.csv",
            "text\none\nred, green\n",
            "a.csv:3: expected at most 1 cells, got 2. Put quotes around a cell with a comma.",
        ),
        ("a.jsonl", '{"a": 1}\n\nnot json\n', "a.jsonl:3: expected one JSON object a line, got Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: expected one JSON object a line, got list."),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(name: str, text: str, wanted: str, tmp_path: Path) -> None:
    assert refusal(read_rows, written(tmp_path / name, text)).startswith(f"{tmp_path}/{wanted}")


def test_a_cell_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text\n" + "x" * 140_000 + "\n")
    assert refusal(read_rows, path).startswith(f"{path}:2: expected comma-separated values, got field larger than")


def test_the_column_of_text_is_the_one_asked_for_or_a_usual_one(tmp_path: Path) -> None:
    rows = [{"label": 1, "sentence": "one", "review": "two"}]
    assert text_column(rows, tmp_path, None) == "sentence"
    assert text_column(rows, tmp_path, "review") == "review"


def test_a_column_that_is_not_there_is_refused_with_those_found(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "label,text\n0,one\n")
    wanted = f"{path}: expected a column `txet`, got the columns label, text. Set `text_column`."
    assert refusal(text_column, read_rows(path, header="txet"), path, "txet") == wanted
    other = written(tmp_path / "b.csv", "label,review\n0,one\n")
    wanted = "expected a column `reviw`, got the first line label,review. Set `text_column`."
    assert refusal(text_column, read_rows(other, header="reviw"), other, "reviw").endswith(wanted)
    wanted = (
        "expected a column named text or sentence or content or prompt or question, got the columns a, b. Set `text_column`."
    )
    assert refusal(text_column, [{"a": 1, "b": 2}], other, None).endswith(wanted)


def test_blank_texts_are_left_out_and_missing_ones_refused_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert texts_of([{"text": "one"}, {"text": " "}, {"text": ""}, {"text": 2}], path, None) == ["one", "2"]
    for row in ({}, {"text": None}, {"text": ["one"]}, {"other": "two"}):
        found = refusal(texts_of, [{"text": "one"}, row], path, None)
        assert found.startswith(f"{path}, row 2: expected text in the column `text`, got")
    assert refusal(texts_of, [{"text": " "}], path, None) == f"{path}: expected text in the column `text`, got none."


def test_rows_must_have_every_column_that_is_needed(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.csv", [{"a": "1", "b": "2"}, {"a": "1", "b": ""}]
    need_columns(rows[:1], path, ("a", "b"))
    assert refusal(need_columns, rows, path, ("a", "b")) == f"{path}, row 2: expected the columns a, b, got nothing in b."
    assert refusal(need_columns, [{}], path, ("a",)) == f"{path}, row 1: expected the columns a, got none."


def test_arrays_come_back_from_npz_and_safetensors(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=np.array([1, 2, 3]))
    save_file({"x": x, "y": torch.tensor([1, 2, 3])}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        found = read_arrays(tmp_path / name)
        assert set(found) == {"x", "y"}
        assert torch.equal(found["x"], x)
        assert found["y"].tolist() == [1, 2, 3]


def damaged(path: Path, keep: int | None = None, **change: bytes) -> Path:
    """Cut a file off, or put other bytes at its start."""
    content = path.read_bytes()[:keep]
    path.write_bytes(change.get("start", b"") + content[len(change.get("start", b"")) :])
    return path


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    wanted = "the file is damaged or holds no arrays: "
    for i, harm in enumerate([{"keep": 100}, {"start": b"xxxx"}, {"keep": 0}, {"keep": -30}, {"keep": 3}]):
        np.savez(tmp_path / f"{i}.npz", x=np.zeros((50, 2)))
        path = damaged(tmp_path / f"{i}.npz", **harm)  # type: ignore[arg-type]
        assert refusal(read_arrays, path).startswith(f"{path}: {wanted}")
        save_file({"x": torch.zeros(50, 2)}, tmp_path / f"{i}.safetensors")
        path = damaged(tmp_path / f"{i}.safetensors", **harm)  # type: ignore[arg-type]
        assert refusal(read_arrays, path).startswith(f"{path}: {wanted}")


def test_bytes_changed_inside_an_archive_are_noticed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(4000.0))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(bytes(content))
    assert "the file is damaged or holds no arrays" in refusal(read_arrays, tmp_path / "a.npz")


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([Harm(tmp_path / "harm")], dtype=object))
    assert "Object arrays cannot be loaded when allow_pickle=False" in refusal(read_arrays, tmp_path / "a.npz")
    torch.save({"x": Harm(tmp_path / "harm")}, tmp_path / "b.npz")
    assert "the file is damaged or holds no arrays" in refusal(read_arrays, tmp_path / "b.npz")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arrays", "sizes"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "[3, 4]"),
        ({"x": np.zeros((0, 2))}, "[0]"),
        ({"x": np.float32(1)}, "[0]"),
        ({}, "[]"),
    ],
)
def test_arrays_of_different_or_no_length_are_refused(arrays: dict[str, Any], sizes: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    wanted = f"{tmp_path}/a.npz: expected arrays with the same number of samples, got sizes {sizes}."
    assert refusal(read_arrays, tmp_path / "a.npz") == wanted


def test_a_single_array_and_arrays_of_words_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "the file is damaged or holds no arrays" in refusal(read_arrays, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.array(["one", "two"]))
    assert "the file is damaged or holds no arrays" in refusal(read_arrays, tmp_path / "b.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_with_other_names_are_refused_with_those_found(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, ids=np.zeros((2, 3)), mask=np.zeros((2, 3)))
    else:
        save_file({"ids": torch.zeros(2, 3), "mask": torch.zeros(2, 3)}, path)
    found = refusal(load_batches, Request(path.name, INPUTS, base=tmp_path))
    assert found == f"{path}: expected arrays named input_ids, attention_mask, got ids, mask."


def test_masks_may_be_missing_and_arrays_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.ones((5, 3), dtype=np.int64), other=np.zeros(5), labels=np.arange(5))
    found = load_batches(Request("a.npz", INPUTS, base=tmp_path, batch_size=2))
    assert [set(batch) for batch in found] == [{"input_ids", "labels"}] * 3
    assert [len(batch["labels"]) for batch in found] == [2, 2, 1]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    wanted = "expected a .txt, .jsonl, .csv, .npz or .safetensors file, or module:factory, got .parquet."
    assert refusal(load_batches, Request("a.parquet", INPUTS, base=tmp_path)) == f"{tmp_path}/a.parquet: {wanted}"
    assert refusal(load_batches, Request("a", INPUTS, base=tmp_path)).endswith("got no suffix.")


@pytest.mark.parametrize(
    ("dataset", "factory"),
    [
        ("pkg.module:factory", True),
        ("m:f", True),
        ("a.txt", False),
        ("a/b:f", False),
        ("pkg:", False),
        (":f", False),
        ("m:f()", False),
    ],
)
def test_a_factory_is_a_module_and_a_name(dataset: str, factory: bool) -> None:
    assert is_factory(dataset) is factory


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's, which leaves a mark when it is imported."""
    written(
        tmp_path / "users_batches.py",
        "import pathlib, torch\n"
        "pathlib.Path(__file__).with_name('mark').touch()\n"
        "def make():\n"
        "    yield {'x': torch.ones(2, 3)}\n"
        "    yield torch.zeros(2, 3)\n"
        "    yield (torch.zeros(1, 3), torch.ones(1))\n"
        "def none():\n    return []\n"
        "def number():\n    return 3\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_batches", raising=False)
    return "users_batches"


def test_a_factory_runs_only_when_code_is_allowed(module: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"users_batches:make: a factory runs code of yours. Add `--allow-code` to let it run"):
        load_batches(Request(f"{module}:make", ["x"]))
    assert not (tmp_path / "mark").exists()
    found = load_batches(Request(f"{module}:make", ["x", "labels"], allow_code=True))
    assert [set(batch) for batch in found] == [{"x"}, {"x"}, {"x", "labels"}]
    assert [batch["x"].shape[0] for batch in found] == [2, 2, 1]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("users_batches:missing", "has no attribute 'missing'. Is its folder on PYTHONPATH?"),
        ("no_module_of_this_name:make", "No module named 'no_module_of_this_name'. Is its folder on PYTHONPATH?"),
        ("users_batches:none", "expected at least one batch, got none."),
        ("users_batches:number", "expected several batches, got int. Put one batch into a list."),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_factory_that_cannot_be_used_is_refused(name: str, wanted: str) -> None:
    found = refusal(load_batches, Request(name, ["x"], allow_code=True))
    assert found.startswith(f"{name}: ")
    assert found.endswith(wanted)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ([3], "int"),
        (["text"], "str"),
        ([{}], "dict"),
        ([{"x": [1, 2]}], "dict"),
        ([()], "tuple"),
        ([(torch.zeros(1), 3)], "tuple"),
    ],
)
def test_batches_without_tensors_are_refused(given: Any, got: str) -> None:
    assert refusal(batches_of, given, ["x"]) == f"calibration: expected batches of tensors, by name or in order, got {got}."


def test_one_batch_that_is_no_list_of_batches_is_refused() -> None:
    wanted = "calibration: expected several batches, got dict. Put one batch into a list."
    assert refusal(batches_of, {"x": torch.zeros(2, 3)}, ["x"]) == wanted


def test_batches_are_the_same_every_time() -> None:
    found = batches_of((torch.full((2, 3), float(i)) for i in range(3)), ["x"])
    assert isinstance(found, Batches)
    assert len(found) == 3
    assert [float(b["x"][0, 0]) for b in found] == [float(b["x"][0, 0]) for b in found] == [0.0, 1.0, 2.0]
