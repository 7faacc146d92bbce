"""A data file as batches for a model: what `calibration` and `evaluate` name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lrc.data.batches import IGNORED, Batches, drawn, from_factory, in_batches, of_equal_length
from lrc.data.files import Row, ids_of, read_arrays, read_rows, read_text, texts_of
from lrc.data.text import Sample, Tokenizer, load_tokenizer, sliding, token_stream, tokenize, windows
from lrc.errors import DataError, UsageError

ID_COLUMNS = ("input_ids", "ids", "tokens")


@dataclass(frozen=True)
class Request:
    """What is asked of a data file.

    inputs: the model's input names; samples: how many, or None for all; draw: choose them by `seed`, not from the start.
    """

    dataset: str
    inputs: Sequence[str]
    task: str | None = None
    tokenizer: Path | None = None
    base: Path = Path()
    samples: int | None = None
    max_length: int = 128
    batch_size: int = 16
    seed: int = 0
    draw: bool = True
    text_column: str | None = None
    allow_code: bool = False

    @property
    def path(self) -> Path:
        """The file, from the spec's folder."""
        return self.base / self.dataset


def load_batches(request: Request) -> Batches:
    """Return the batches of a data file. Raises DataError or UsageError with the file and what is wrong in it."""
    if is_factory(request.dataset):
        return from_factory(request.dataset, request.inputs, allow_code=request.allow_code)
    suffix = request.path.suffix
    if suffix in (".npz", ".safetensors"):
        return _arrays(request)
    if suffix in (".txt", ".jsonl", ".csv", ".tokens", ".json"):
        return _tokens(request)
    raise DataError(
        str(request.path),
        expected="a .txt, .jsonl, .csv, .npz or .safetensors file, or module:factory",
        got=suffix or "no suffix",
    )


def is_factory(dataset: str) -> bool:
    """Say whether a dataset is named as `package.module:factory`."""
    module, colon, attribute = dataset.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_windows(request: Request) -> Batches:
    """Return windows of one stream of tokens, `max_length` each, as a language model reads them."""
    found = windows(read_stream(request), request.max_length, str(request.path))
    places = _places(len(found), request)
    ids = torch.tensor([found[i] for i in places])
    arrays = {"input_ids": ids}
    if "attention_mask" in request.inputs:
        arrays["attention_mask"] = torch.ones_like(ids)
    return in_batches(arrays, request.batch_size)


def load_sliding_windows(request: Request, stride: int) -> Batches:
    """Return windows of `max_length` tokens, one every `stride` of them, and the last one where the stream ends.

    `labels` are the ids that no window before holds, and -100 for all others. `samples` of them are the first ones.
    """
    stream = read_stream(request)
    starts = sliding(len(stream), request.max_length, stride, str(request.path))[: request.samples]
    ids = torch.tensor([stream[start : start + request.max_length] for start in starts])
    ends = torch.tensor([0, *(start + request.max_length for start in starts[:-1])])
    places = torch.tensor(starts)[:, None] + torch.arange(request.max_length)
    arrays = {"input_ids": ids, "labels": ids.masked_fill(places < ends[:, None], IGNORED)}
    if "attention_mask" in request.inputs:
        arrays["attention_mask"] = torch.ones_like(ids)
    return in_batches(arrays, request.batch_size)


def read_stream(request: Request) -> list[int]:
    """Return all ids of a file, one after the other."""
    path = request.path
    if path.suffix in (".jsonl", ".csv"):
        rows = read_rows(path, header=request.text_column)
        column = _id_column(rows, request)
        if column is not None:
            return [i for ids in ids_of(rows, path, column) for i in ids]
        return token_stream(_tokenizer(request), "\n".join(texts_of(rows, path, request.text_column)))
    return token_stream(_tokenizer(request), read_text(path))


def load_samples(request: Request) -> list[Sample]:
    """Return one tokenised sample a line or row."""
    path = request.path
    if path.suffix in (".jsonl", ".csv"):
        rows = read_rows(path, header=request.text_column)
        column = _id_column(rows, request)
        if column is not None:
            every = ids_of(rows, path, column)
            ids = [every[i][: request.max_length] for i in _places(len(rows), request)]
            extra = [name for name in request.inputs if name in ("attention_mask", "token_type_ids")]
            fills = {"attention_mask": 1, "token_type_ids": 0}
            return [{"input_ids": i} | {name: [fills[name]] * len(i) for name in extra} for i in ids]
        texts = texts_of(rows, path, request.text_column)
    else:
        texts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    chosen = [texts[i] for i in _places(len(texts), request)]
    return tokenize(_tokenizer(request), chosen, request.inputs, request.max_length)


def _id_column(rows: Sequence[Row], request: Request) -> str | None:
    """Return the column of token ids, where the file has one and no column of text is asked for."""
    if request.path.suffix != ".jsonl" or request.text_column is not None:
        return None
    return next((column for column in ID_COLUMNS if column in rows[0]), None)


def _tokens(request: Request) -> Batches:
    if request.task == "text-generation":
        return load_windows(request)
    return of_equal_length(load_samples(request), request.batch_size)


def _arrays(request: Request) -> Batches:
    arrays = read_arrays(request.path)
    known = [name for name in arrays if name in request.inputs or name == "labels"]
    missing = [
        name for name in request.inputs if name not in arrays and not name.endswith(("mask", "type_ids", "position_ids"))
    ]
    if missing or not known:
        raise DataError(
            str(request.path), expected=f"arrays named {', '.join(request.inputs)}", got=", ".join(arrays) or "none"
        )
    count = next(iter(arrays.values())).shape[0]
    places = torch.tensor(_places(count, request))
    return in_batches({name: arrays[name][places] for name in known}, request.batch_size)


def _places(count: int, request: Request) -> list[int]:
    wanted = count if request.samples is None else request.samples
    return drawn(count, wanted, request.seed) if request.draw else list(range(min(count, wanted)))


def _tokenizer(request: Request) -> Tokenizer:
    if request.tokenizer is None:
        raise UsageError(
            str(request.path),
            message="text needs a model folder with a tokenizer",
            hint="Give arrays named as the model's inputs",
        )
    return load_tokenizer(request.tokenizer)
