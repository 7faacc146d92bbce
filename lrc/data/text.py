"""Tokenising with the model folder's own tokenizer."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from lrc.errors import DataError, UsageError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
Sample = dict[str, list[int]]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    model_input_names: list[str]

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Turn text into ids, masks and types."""


@lru_cache(maxsize=4)
def load_tokenizer(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer. Raises UsageError when it has none, or transformers is not installed."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise UsageError("tokenizer", message="text needs transformers", hint="pip install 'lrc-compiler[hf]'") from error
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
    ):
        raise DataError(
            str(folder),
            message="the folder has no tokenizer",
            hint="Give token ids: a .jsonl file with `input_ids`, or arrays",
        )
    try:
        made: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        if not (folder / "tokenizer.json").is_file():
            raise DataError(str(folder), message=f"the tokenizer does not load: {str(error).splitlines()[0]}") from error
        made = PreTrainedTokenizerFast.from_pretrained(folder)
    return made


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str], max_length: int) -> list[Sample]:
    """Return every text as ids (with special tokens) and what else of `names` the tokenizer produces, cut to `max_length`."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    wanted = [name for name in names if name in encoded]
    if "input_ids" not in wanted:
        raise DataError("calibration", expected="a model that takes `input_ids`", got=f"inputs {', '.join(names)}")
    return [{name: list(encoded[name][i]) for name in wanted} for i in range(len(texts))]


def token_stream(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a whole text as one stream of ids, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(stream: Sequence[int], max_length: int, where: str) -> list[list[int]]:
    """Cut a stream into windows of `max_length` ids without overlap; the rest at the end is left out.

    Raises DataError when there is not even one.
    """
    _check_length(len(stream), max_length, where)
    return [list(stream[i : i + max_length]) for i in range(0, len(stream) - max_length + 1, max_length)]


def sliding(count: int, max_length: int, stride: int, where: str) -> list[int]:
    """Return where windows of `max_length` of `count` ids start, `stride` apart, and one more that ends where the ids do.

    Raises DataError when there is not even one.
    """
    _check_length(count, max_length, where)
    last = count - max_length
    return [*range(0, last, stride), last]


def _check_length(count: int, max_length: int, where: str) -> None:
    if count < max_length:
        raise DataError(where, expected=f"at least {max_length} tokens", got=str(count), hint="Lower `max_length`")
