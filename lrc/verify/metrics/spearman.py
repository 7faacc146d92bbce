"""Rank correlation of the similarity of two sentences with what people say."""

from typing import Literal

import torch
from scipy.stats import spearmanr

from lrc.data.files import need_columns, read_rows
from lrc.errors import DataError
from lrc.verify.metrics.base import MetricOptions, Subject, embeddings, metric

COLUMNS = ("sentence1", "sentence2", "score")


class Spearman(MetricOptions):
    """Spearman's rank correlation of the cosine of sentence embeddings with scores."""

    type: Literal["spearman"] = "spearman"


@metric(Spearman)
def spearman(subject: Subject, options: Spearman) -> float:
    """Return the correlation, -1 … 1. The data has the columns sentence1, sentence2, score (or three without a header).

    Raises DataError for rows that lack one, and for scores that are no numbers.
    """
    request = subject.data(options)
    rows = read_rows(request.path, COLUMNS)[: request.samples]
    need_columns(rows, request.path, COLUMNS)
    try:
        scores = [float(row["score"]) for row in rows]
    except ValueError as error:
        raise DataError(str(request.path), expected="numbers in the column `score`", got=str(error)) from error
    left = embeddings(subject.runner, [str(row["sentence1"]) for row in rows], request)
    right = embeddings(subject.runner, [str(row["sentence2"]) for row in rows], request)
    cosine = torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)
    return float(spearmanr(cosine.numpy(), scores).statistic)
