"""Training data: examples out of a file or a factory, and the batches of every epoch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from lrc.data import Batch, Request, is_factory, load_batches, load_windows
from lrc.data.files import need_columns, read_rows, texts_of
from lrc.data.load import load_samples
from lrc.data.text import load_tokenizer, tokenize
from lrc.errors import DataError, UsageError
from lrc.spec.base import SpecModel

Reads = Literal["windows", "lines", "labelled", "pairs"]
Example = dict[str, Tensor]
ARRAYS = (".npz", ".safetensors")
PAIRS = ("sentence1", "sentence2", "score")
OTHER = "other."  # before the names of the second text of a pair
FILLS = {"labels": -100}  # what padded positions hold, 0 where nothing is said
BUCKET = 8  # batches whose examples are sorted by length together


class TrainData(SpecModel):
    """What is trained on."""

    dataset: str = Field(description="As for `calibration`: .txt, .jsonl, .csv, .npz, .safetensors, or package.module:factory.")
    samples: int | None = Field(default=None, ge=1, description="How many are drawn, without replacement; all without it.")
    max_length: int = Field(default=128, ge=1, description="Tokens a sample.")
    text_column: str | list[str] | None = Field(
        default=None, description="The column of text in .jsonl and .csv files; of several, each text is a sample."
    )
    label_column: str = Field(default="label", description="The column of labels.")
    columns: list[str] | None = Field(default=None, description="Names of the columns of a .csv file without a header.")


def _from_word(value: Any) -> Any:
    return {"dataset": value} if isinstance(value, str) else value


DataField = Annotated[TrainData, BeforeValidator(_from_word, json_schema_input_type=TrainData | str)]


@dataclass(frozen=True)
class Examples:
    """Single samples, each a mapping of tensors without a batch dimension; `labels` among them where there are any.

    pads: what padded positions of an input hold; masked: whether the model takes a mask, so that lengths may differ.
    """

    items: tuple[Example, ...]
    pads: Mapping[str, int]
    masked: bool

    def __len__(self) -> int:
        return len(self.items)

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as places of their examples: another order every epoch, whole batches alone.

        Examples of about one length stand together, so that little is padded; without a mask, of exactly one length.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        lengths = [next(iter(e.values())).shape[0] if next(iter(e.values())).ndim else 0 for e in self.items]
        batches: list[list[int]] = []
        size = BUCKET * batch_size
        pools = [order[i : i + size] for i in range(0, len(order), size)] if self.masked else [order]
        rest: list[int] = []
        for pool in pools:
            pool = rest + pool
            pool.sort(key=lambda i: lengths[i])
            if not self.masked:
                batches += _of_one_length(pool, lengths, batch_size)
                continue
            whole = len(pool) // batch_size * batch_size
            batches += [pool[i : i + batch_size] for i in range(0, whole, batch_size)]
            rest = pool[whole:]
        places = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in places]

    def numbers(self, places: Sequence[int]) -> int:
        """Return how many positions the batch of these examples has, padded ones too."""
        lengths = [first.shape[0] if first.ndim else 1 for first in (next(iter(self.items[i].values())) for i in places)]
        return len(lengths) * max(lengths)

    def batch(self, places: Sequence[int]) -> Batch:
        """Return examples as one batch, padded at the end; the second texts of pairs follow after all the first ones."""
        chosen = [self.items[i] for i in places]
        names = [name for name in chosen[0] if not name.startswith(OTHER)]
        made: Batch = {}
        for name in names:
            values = [e[name] for e in chosen] + [e[OTHER + name] for e in chosen if OTHER + name in e]
            made[name] = padded(values, self.pads.get(name, FILLS.get(name, 0)))
        return made


def padded(values: Sequence[Tensor], fill: int) -> Tensor:
    """Stack tensors that may differ in their first size."""
    longest = max(v.shape[0] if v.ndim else 0 for v in values)
    if all(v.ndim == 0 or v.shape[0] == longest for v in values):
        return torch.stack(list(values))
    made = values[0].new_full((len(values), longest, *values[0].shape[1:]), fill)
    for row, value in zip(made, values, strict=True):
        row[: value.shape[0]] = value
    return made


def _of_one_length(pool: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in pool:
        groups.setdefault(lengths[i], []).append(i)
    return [
        group[i : i + batch_size]
        for group in groups.values()
        for i in range(0, len(group) - batch_size + 1, batch_size)
    ]  # fmt: skip


def load_examples(request: Request, spec: TrainData, reads: Reads) -> Examples:
    """Read the data as an objective reads it.

    Arrays and factories give examples row by row. Text: `windows` of one stream of tokens, one sample a line or row
    (`lines`), a text and a whole number or other number (`labelled`), or two sentences and a score (`pairs`).
    Raises DataError or UsageError with the file and what is wrong in it.
    """
    column = spec.text_column if isinstance(spec.text_column, str) else None
    request = replace(request, dataset=spec.dataset, samples=spec.samples, max_length=spec.max_length, text_column=column)
    if is_factory(spec.dataset) or request.path.suffix in ARRAYS:
        return of_batches(load_batches(request), request)
    if reads == "windows":
        return of_batches(load_windows(request), request)
    if reads == "pairs":
        return _finish(_pairs(request, spec), request)
    if reads == "labelled":
        return _finish(_labelled(request, spec), request)
    if isinstance(spec.text_column, list) or spec.columns:
        return _finish([as_tensors(s) for s in _tokenized(_texts(request, spec), request)], request)
    return _finish([as_tensors(sample) for sample in load_samples(request)], request)


def of_batches(batches: Iterable[Mapping[str, Tensor]], request: Request) -> Examples:
    """Return the rows of batches as examples."""
    items: list[Example] = []
    for batch in batches:
        count = {value.shape[0] for value in batch.values() if value.ndim}
        if len(count) != 1:
            raise DataError(request.dataset, expected="tensors of one batch size", got=f"{sorted(count)}")
        items += [{name: value[i] for name, value in batch.items() if value.ndim} for i in range(count.pop())]
    return _finish(items, request)


def _finish(items: Sequence[Example], request: Request) -> Examples:
    pads: dict[str, int] = {}
    if request.tokenizer is not None and "input_ids" in request.inputs and _has_tokenizer(request):
        pads["input_ids"] = int(getattr(load_tokenizer(request.tokenizer), "pad_token_id", 0) or 0)
    return Examples(tuple(items), pads, "attention_mask" in request.inputs)


def _has_tokenizer(request: Request) -> bool:
    return request.tokenizer is not None and any(request.tokenizer.glob("tokenizer*"))


def as_tensors(sample: Mapping[str, Sequence[int]]) -> Example:
    """Return a tokenised sample as tensors."""
    return {name: torch.tensor(list(values)) for name, values in sample.items()}


def _tokenized(texts: Sequence[str], request: Request) -> list[dict[str, list[int]]]:
    if request.tokenizer is None:
        raise UsageError(str(request.path), message="text needs a model folder with a tokenizer", hint="Give arrays")
    return tokenize(load_tokenizer(request.tokenizer), texts, request.inputs, request.max_length)


def _rows(request: Request, spec: TrainData, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that are used, drawn by the seed where not all are asked for."""
    rows = read_rows(request.path, spec.columns or columns, header=request.text_column)
    if request.samples is None or request.samples >= len(rows):
        return rows
    generator = torch.Generator().manual_seed(request.seed)
    chosen = sorted(torch.randperm(len(rows), generator=generator)[: request.samples].tolist())
    return [rows[i] for i in chosen]


def _texts(request: Request, spec: TrainData) -> list[str]:
    """Return the different texts of the columns, in order."""
    columns = spec.text_column if isinstance(spec.text_column, list) else [spec.text_column]
    rows = _rows(request, spec, [c for c in columns if c])
    found = [text for column in columns for text in texts_of(rows, request.path, column)]
    return list(dict.fromkeys(found))


def _labelled(request: Request, spec: TrainData) -> list[Example]:
    rows = _rows(request, spec, (request.text_column or "text", spec.label_column))
    need_columns(rows, request.path, [spec.label_column])
    texts = texts_of(rows, request.path, request.text_column)
    if len(texts) != len(rows):
        raise DataError(str(request.path), expected="a text in every row", got=f"{len(rows) - len(texts)} blank ones")
    labels = [_number(row[spec.label_column], request, spec.label_column) for row in rows]
    whole = all(label == int(label) for label in labels)
    kind = torch.int64 if whole else torch.float32
    samples = _tokenized(texts, request)
    return [as_tensors(s) | {"labels": torch.tensor(label, dtype=kind)} for s, label in zip(samples, labels, strict=True)]


def _pairs(request: Request, spec: TrainData) -> list[Example]:
    rows = _rows(request, spec, PAIRS)
    need_columns(rows, request.path, PAIRS)
    left, right = (_tokenized([str(row[c]) for row in rows], request) for c in PAIRS[:2])
    scores = [_number(row[PAIRS[2]], request, PAIRS[2]) for row in rows]
    return [
        as_tensors(a) | {OTHER + name: value for name, value in as_tensors(b).items()} | {"labels": torch.tensor(score)}
        for a, b, score in zip(left, right, scores, strict=True)
    ]


def _number(value: Any, request: Request, column: str) -> float:
    try:
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(str(request.path), expected=f"numbers in the column `{column}`", got=repr(value)) from error
    return found
