"""From samples to batches: drawn without replacement, grouped by length, cut from one stream."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.data import Request, load_batches, load_windows
from lrc.data.batches import drawn, in_batches, of_equal_length
from lrc.data.text import load_tokenizer, windows
from lrc.errors import DataError, UsageError

NAMES = ("input_ids", "token_type_ids", "attention_mask")
IDS = {word: i for i, word in enumerate([*tiny.SPECIAL, *tiny.WORDS])}


@pytest.fixture(scope="module")
def bert_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts [CLS] and [SEP] around every text."""
    folder = tmp_path_factory.mktemp("special")
    tiny.write_tokenizer(folder, NAMES, special=True)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words alone."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.write_tokenizer(folder)
    return folder


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def rows_of(batches: Any, name: str = "input_ids") -> list[list[int]]:
    return [row for batch in batches for row in batch[name].tolist()]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), samples=st.integers(1, 50), seed=st.integers(0, 1000))
def test_draws_are_without_replacement_in_order_and_the_same_for_a_seed(count: int, samples: int, seed: int) -> None:
    places = drawn(count, samples, seed)
    assert len(places) == min(count, samples)
    assert places == sorted(set(places))
    assert set(places) <= set(range(count))
    assert drawn(count, samples, seed) == places


def test_another_seed_draws_other_samples_and_global_randomness_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len({tuple(drawn(100, 10, seed)) for seed in range(20)}) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_every_place_is_drawn_equally_often() -> None:
    counts = torch.zeros(8)
    for seed in range(800):
        counts[drawn(8, 2, seed)] += 1
    deviation = (800 * 0.25 * 0.75) ** 0.5
    assert (counts - 200).abs().max() < 5 * deviation


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=12), batch_size=st.integers(1, 4))
def test_grouping_by_length_pads_nothing_and_keeps_every_sample(lengths: list[int], batch_size: int) -> None:
    samples = [{"input_ids": [10 * i + j for j in range(n)], "attention_mask": [1] * n} for i, n in enumerate(lengths)]
    batches = of_equal_length(samples, batch_size)
    assert sorted(rows_of(batches)) == sorted(sample["input_ids"] for sample in samples)
    sizes = [batch["input_ids"].shape for batch in batches]
    assert all(1 <= rows <= batch_size for rows, _ in sizes)
    assert [columns for _, columns in sizes] == sorted(columns for _, columns in sizes)
    assert all(batch["attention_mask"].all() for batch in batches)
    for length in set(lengths):
        mine = [row for row in rows_of(batches) if len(row) == length]
        assert mine == [s["input_ids"] for s in samples if len(s["input_ids"]) == length]


def test_arrays_are_cut_into_batches_that_hold_every_row_once() -> None:
    x = torch.arange(14.0).reshape(7, 2)
    batches = in_batches({"x": x, "y": torch.arange(7)}, 3)
    assert [len(batch["x"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), x)
    assert rows_of(in_batches({"y": torch.arange(7)[:, None]}, 3), "y") == [[i] for i in range(7)]


def test_a_text_file_is_one_sample_a_line_with_special_tokens_and_all_that_the_model_takes(
    bert_like: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\n  a dog runs  \nbird\nthe red fish\n")
    found = load_batches(Request("a.txt", NAMES, "feature-extraction", bert_like, tmp_path, batch_size=8))
    assert rows_of(found) == [
        [2, *ids("bird"), 3],
        [2, *ids("the cat"), 3],
        [2, *ids("a dog runs"), 3],
        [2, *ids("the red fish"), 3],
    ]
    for batch in found:
        assert list(batch) == list(NAMES)
        assert batch["attention_mask"].all()
        assert not batch["token_type_ids"].any()
        assert batch["input_ids"].dtype == torch.int64
    only = load_batches(Request("a.txt", ["input_ids"], None, bert_like, tmp_path))
    assert {name for batch in only for name in batch} == {"input_ids"}


def test_samples_are_cut_to_the_length_asked_for_special_tokens_included(bert_like: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the red cat eats fish\n")
    found = load_batches(Request("a.txt", NAMES, None, bert_like, tmp_path, max_length=4))
    assert rows_of(found) == [[2, *ids("the red"), 3]]


def test_samples_are_drawn_by_the_seed_or_taken_from_the_start(plain: Path, tmp_path: Path) -> None:
    lines = [f"the {word}" for word in tiny.WORDS[:20]]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    request = Request("a.txt", ["input_ids"], None, plain, tmp_path, samples=5, seed=3)
    expected = [ids(lines[i]) for i in drawn(20, 5, 3)]
    assert rows_of(load_batches(request)) == expected
    first = Request("a.txt", ["input_ids"], None, plain, tmp_path, samples=5, draw=False)
    assert rows_of(load_batches(first)) == [ids(line) for line in lines[:5]]
    every = Request("a.txt", ["input_ids"], None, plain, tmp_path)
    assert rows_of(load_batches(every)) == [ids(line) for line in lines]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "b.csv"])
def test_rows_give_the_text_of_their_column(name: str, plain: Path, tmp_path: Path) -> None:
    texts = ["the cat", "a dog", "one fish"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"label": 1, "review": text}) + "\n" for text in texts))
    (tmp_path / "a.csv").write_text("label,review\n" + "".join(f"1,{text}\n" for text in texts))
    (tmp_path / "b.csv").write_text("".join(f"1,{text}\n" for text in texts))
    column = "1" if name == "b.csv" else "review"
    found = load_batches(Request(name, ["input_ids"], None, plain, tmp_path, text_column=column))
    assert rows_of(found) == [ids(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "text", "column", "wanted"),
    [
        ("a.csv", "label,text\n1,the cat\n", "txet", "a.csv: expected a column `txet`, got the columns label, text."),
        ("a.csv", "label,review\n1,the cat\n", "reviw", "a.csv: expected a column `reviw`, got the first line label,review."),
        ("a.csv", "label,review\n1,the cat\n", None, "got the first line label,review. Set `text_column`."),
        ("a.csv", "label,text\n1,the cat\n2\n", None, "a.csv, row 2: expected text in the column `text`, got None."),
        ("a.jsonl", '{"text": "the cat"}\n{"txt": "a dog"}\n', None, "a.jsonl, row 2: expected text in the column `text`"),
        ("a.jsonl", '{"label": 1}\n', None, "question, got the columns label. Set `text_column`."),
    ],
)
@pytest.mark.parametrize("task", [None, "text-generation"])
def test_columns_that_are_not_there_are_refused_with_those_found(
    name: str, text: str, column: str | None, wanted: str, task: str | None, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load_batches(Request(name, ["input_ids"], task, plain, tmp_path, text_column=column))
    assert wanted in str(caught.value)


@pytest.mark.parametrize("column", ["input_ids", "ids", "tokens"])
def test_token_ids_need_no_tokenizer(column: str, tmp_path: Path) -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({column: row}) for row in rows))
    found = load_batches(Request("a.jsonl", NAMES, None, base=tmp_path, max_length=3))
    assert rows_of(found) == [[8, 9], [5, 6, 7], [10, 11, 12]]
    assert all(batch["attention_mask"].all() and not batch["token_type_ids"].any() for batch in found)
    stream = load_batches(Request("a.jsonl", ["input_ids"], "text-generation", base=tmp_path, max_length=4))
    assert rows_of(stream) == [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize("value", ["123", [], [1.5], ["a"], [True], [-1], None, 7])
@pytest.mark.parametrize("task", [None, "text-generation"])
def test_ids_that_are_no_lists_of_whole_numbers_are_refused(value: Any, task: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [1, 2]}) + "\n" + json.dumps({"input_ids": value}))
    with pytest.raises(DataError, match=r"a.jsonl, row 2: expected a list of token ids in `input_ids`, got"):
        load_batches(Request("a.jsonl", ["input_ids"], task, base=tmp_path, max_length=2))


def test_a_language_model_reads_one_stream_in_windows_without_overlap(plain: Path, tmp_path: Path) -> None:
    words = tiny.WORDS[:23]
    (tmp_path / "a.txt").write_text("\n".join(" ".join(words[i : i + 4]) for i in range(0, 23, 4)))
    request = Request("a.txt", ["input_ids", "attention_mask"], "text-generation", plain, tmp_path, max_length=5, batch_size=3)
    found = load_batches(request)
    stream = ids(" ".join(words))
    assert rows_of(found) == [stream[i : i + 5] for i in (0, 5, 10, 15)]
    assert [len(batch["input_ids"]) for batch in found] == [3, 1]
    assert all(batch["attention_mask"].all() for batch in found)


def test_windows_are_drawn_by_the_seed(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(tiny.WORDS[:40]))
    stream = ids(" ".join(tiny.WORDS[:40]))
    found = load_windows(Request("a.txt", ["input_ids"], None, plain, tmp_path, samples=3, max_length=4, seed=7))
    assert rows_of(found) == [stream[4 * i : 4 * i + 4] for i in drawn(10, 3, 7)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_the_stream_of_rows_is_their_text_alone(name: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": ""}\n{"text": "a dog"}\n')
    (tmp_path / "a.csv").write_text("label,text\n1,the cat\n1,\n0,a dog\n")
    found = load_batches(Request(name, ["input_ids"], "text-generation", plain, tmp_path, max_length=2))
    assert rows_of(found) == [ids("the cat"), ids("a dog")]


@settings(max_examples=20, deadline=None)
@given(stream=st.lists(st.integers(0, 99), max_size=30), length=st.integers(1, 8))
def test_windows_cover_the_stream_and_leave_out_only_the_rest(stream: list[int], length: int) -> None:
    if len(stream) < length:
        with pytest.raises(DataError, match=f"here: expected at least {length} tokens, got {len(stream)}. Lower `max_length`"):
            windows(stream, length, "here")
        return
    found = windows(stream, length, "here")
    assert [i for window in found for i in window] == stream[: len(stream) // length * length]
    assert {len(window) for window in found} == {length}


def test_arrays_are_drawn_and_batched_like_text(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(20.0, dtype=np.float32).reshape(10, 2), labels=np.arange(10))
    request = Request("a.npz", ["x"], base=tmp_path, samples=4, batch_size=3, seed=5)
    found = load_batches(request)
    places = drawn(10, 4, 5)
    assert torch.cat([batch["labels"] for batch in found]).tolist() == places
    assert rows_of(found, "x") == [[2.0 * i, 2.0 * i + 1] for i in places]
    assert [len(batch["x"]) for batch in found] == [3, 1]


def test_text_without_a_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n")
    with pytest.raises(UsageError, match=r"a.txt: text needs a model folder with a tokenizer. Give arrays named as"):
        load_batches(Request("a.txt", ["input_ids"], base=tmp_path))
    with pytest.raises(DataError, match=r"the folder has no tokenizer. Give token ids: a .jsonl file with `input_ids`"):
        load_batches(Request("a.txt", ["input_ids"], tokenizer=tmp_path, base=tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(DataError, match="the tokenizer does not load: "):
        load_tokenizer(tmp_path)


def test_a_model_that_takes_no_ids_cannot_read_text(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n")
    with pytest.raises(DataError, match="expected a model that takes `input_ids`, got inputs pixel_values"):
        load_batches(Request("a.txt", ["pixel_values"], None, plain, tmp_path))


def test_only_line_ends_end_a_sample(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("the cat\u2028a dog\r\none\x0cfish\r\n".encode())
    found = load_batches(Request("a.txt", ["input_ids"], None, plain, tmp_path))
    assert rows_of(found) == [ids("one fish"), ids("the cat a dog")]
