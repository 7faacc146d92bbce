"""Data: files and user code into batches of named tensors; tokenising."""

from lrc.data.batches import Batch, Batches, batches_of
from lrc.data.load import Request, is_factory, load_batches, load_windows

__all__ = ["Batch", "Batches", "Request", "batches_of", "is_factory", "load_batches", "load_windows"]
