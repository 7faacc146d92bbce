"""Quality metrics, against computations by hand and by other libraries."""

import math
import random
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor

import lrc
from lrc.api import Finished
from lrc.data import Request
from lrc.errors import DataError, UsageError
from lrc.lower.base import Runner
from lrc.lower.ort_decoder import open_onnx
from lrc.spec.document import EvaluateSpec
from lrc.verify.evaluate import evaluate
from lrc.verify.metrics.accuracy import Accuracy, accuracy
from lrc.verify.metrics.base import Subject
from lrc.verify.metrics.generation import Divergence, Generation, divergence, generation
from lrc.verify.metrics.perplexity import Perplexity, perplexity
from lrc.verify.metrics.python import PythonMetric, python_metric
from lrc.verify.metrics.spearman import Spearman, spearman
from lrc.verify.runner import run

TABLE = torch.randn(tiny.VOCAB, tiny.VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Bigram:
    """A language model whose next token depends on the last one alone, by a table of logits."""

    def __init__(self, table: Tensor = TABLE) -> None:
        self.table = table

    def __call__(self, **inputs: Any) -> Mapping[str, Tensor]:
        return {"logits": self.table[inputs["input_ids"]]}


class Counter:
    """A classifier whose class is the number of `cat` in the text, and which sees how much runs at a time."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, **inputs: Any) -> Mapping[str, Tensor]:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        count = (inputs["input_ids"] == self.token).sum(1).clamp(max=2)
        return {"logits": torch.nn.functional.one_hot(count, 3).float()}


def request(dataset: Path | str = "", task: str | None = None, **options: Any) -> Request:
    names = ["input_ids", "attention_mask"]
    return Request(dataset=str(dataset), inputs=options.pop("inputs", names), task=task, draw=False, **options)


def subject(runner: Runner, dataset: Path | str = "", task: str | None = None, *, original: Runner | None = None,
            **options: Any) -> Subject:  # fmt: skip
    return Subject(runner, request(dataset, task, **options), original)


def ids_of(stream: Path, length: int) -> Tensor:
    """The windows of a text, by the vocabulary itself."""
    words = [*tiny.SPECIAL, *tiny.WORDS]
    ids = [words.index(word) for word in stream.read_text().split()]
    return torch.tensor([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])


# Perplexity.


def test_perplexity_is_the_one_computed_by_hand(data: Path, llama: Path) -> None:
    windows = ids_of(data / "stream.txt", 16)
    logs = TABLE.log_softmax(-1)
    losses = [-float(logs[a, b]) for window in windows.tolist() for a, b in pairwise(window)]
    found = perplexity(
        subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama, max_length=16, batch_size=3), Perplexity()
    )  # fmt: skip
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(data: Path, llama: Path) -> None:
    uniform = Bigram(torch.zeros(tiny.VOCAB, tiny.VOCAB))
    given = subject(uniform, data / "stream.txt", "text-generation", tokenizer=llama, max_length=10)
    assert perplexity(given, Perplexity()) == pytest.approx(tiny.VOCAB, rel=1e-6)


def test_perplexity_does_not_count_padding(tmp_path: Path) -> None:
    ids = torch.randint(tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 7:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "ids.safetensors")
    logs = TABLE.log_softmax(-1)
    losses = [-float(logs[ids[i, j - 1], ids[i, j]]) for i in range(3) for j in range(1, 9) if mask[i, j]]
    found = perplexity(subject(Bigram(), tmp_path / "ids.safetensors", "text-generation"), Perplexity())
    assert len(losses) == 4 + 8 + 6
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)


def test_perplexity_of_a_decoder_is_its_own_loss(data: Path, llama: Path) -> None:
    program = lrc.capture(str(llama))
    windows = ids_of(data / "stream.txt", 16)
    with torch.no_grad():
        loss = program.origin.model(input_ids=windows, labels=windows).loss  # type: ignore[misc]  # a transformers model
    found = perplexity(subject(program, data / "stream.txt", "text-generation", tokenizer=llama, max_length=16), Perplexity())
    assert found == pytest.approx(math.exp(float(loss)), rel=1e-5)


def by_hand(model: Runner, ids: list[int], max_length: int, stride: int) -> float:
    """The perplexity of every token but the first, each scored in the first window that holds it."""
    losses, scored, begin = [], 1, 0
    while scored < len(ids):
        begin = min(begin, len(ids) - max_length)
        window = torch.tensor([ids[begin : begin + max_length]])
        logs = run(model, {"input_ids": window, "attention_mask": torch.ones_like(window)})["logits"][0].log_softmax(-1)
        losses += [-float(logs[place - begin - 1, ids[place]]) for place in range(scored, begin + max_length)]
        scored, begin = begin + max_length, begin + stride
    assert len(losses) == len(ids) - 1
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("max_length", "stride"), [(16, 5), (16, 1), (16, 15), (12, 6)])
def test_perplexity_by_a_sliding_window_is_that_of_a_loop_by_hand(
    data: Path, llama: Path, max_length: int, stride: int
) -> None:
    program = lrc.capture(str(llama))
    text = data / "stream.txt"
    ids = ids_of(text, 1)[:, 0].tolist()
    given = subject(program, text, "text-generation", tokenizer=llama, max_length=max_length)
    found = perplexity(given, Perplexity(stride=stride))
    assert found == pytest.approx(by_hand(program, ids, max_length, stride), rel=1e-5)
    other = subject(program, text, "text-generation", tokenizer=llama, max_length=40)
    assert found == perplexity(other, Perplexity(stride=stride, max_length=max_length))


def test_an_onnx_decoder_is_scored_by_a_sliding_window_too(finished_decoder: Finished, data: Path, llama: Path) -> None:
    decoder = open_onnx(finished_decoder.path / "onnx" / "model.onnx")
    ids = ids_of(data / "stream.txt", 1)[:, 0].tolist()
    given = subject(decoder, data / "stream.txt", "text-generation", tokenizer=llama, max_length=16)
    assert perplexity(given, Perplexity(stride=7)) == pytest.approx(by_hand(decoder, ids, 16, 7), rel=1e-5)


def test_a_stride_of_the_whole_window_is_no_overlap(data: Path, llama: Path) -> None:
    given = subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama, max_length=16)
    assert perplexity(given, Perplexity(stride=16)) == perplexity(given, Perplexity())
    assert perplexity(given, Perplexity(stride=15)) != perplexity(given, Perplexity())


def test_a_stride_counts_windows_from_the_start(data: Path, llama: Path) -> None:
    program = lrc.capture(str(llama))
    ids = ids_of(data / "stream.txt", 1)[:26, 0].tolist()
    short = subject(program, data / "stream.txt", "text-generation", tokenizer=llama, max_length=16, samples=3)
    assert perplexity(short, Perplexity(stride=5)) == pytest.approx(by_hand(program, ids, 16, 5), rel=1e-5)


def test_a_stride_that_cannot_be_is_an_error(data: Path, llama: Path, tmp_path: Path) -> None:
    given = subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama, max_length=16)
    with pytest.raises(UsageError, match=r"evaluate\.perplexity\.stride: expected at most max_length, 16, got 17"):
        perplexity(given, Perplexity(stride=17))
    save_file({"input_ids": torch.ones(2, 9, dtype=torch.long)}, tmp_path / "ids.safetensors")
    with pytest.raises(UsageError, match=r"expected text, or token ids in one stream, got batches that are cut already"):
        perplexity(subject(Bigram(), tmp_path / "ids.safetensors", "text-generation"), Perplexity(stride=3))


def test_a_text_that_is_too_short_is_an_error(data: Path, llama: Path) -> None:
    with pytest.raises(DataError, match=r"expected at least 4096 tokens, got \d+\. Lower `max_length`"):
        perplexity(subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama, max_length=4096), Perplexity())


# Accuracy.


def labelled(folder: Path, rows: list[tuple[str, object]], header: str = "text,label") -> Path:
    path = folder / "labelled.csv"
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


def test_accuracy_on_text_is_the_share_that_is_right_and_nothing_is_padded(tmp_path: Path, bert: Path) -> None:
    rows = [("the cat sings", 1), ("a dog", 0), ("cat cat cat", 2), ("the man eats fish", 1), ("a dog", 0)]
    counter = Counter([*tiny.SPECIAL, *tiny.WORDS].index("cat"))
    path = labelled(tmp_path, rows)
    assert accuracy(subject(counter, path, "text-classification", tokenizer=bert), Accuracy()) == 4 / 5
    assert counter.shapes == [(1, 4), (2, 5), (1, 6)]  # with [CLS] and [SEP]; equal texts run once


def test_labels_may_be_names_of_the_config_or_of_another_column(tmp_path: Path) -> None:
    folder = tiny.write_bert(
        tmp_path / "model", "BertForSequenceClassification", id2label={0: "none", 1: "one", 2: "more"},
        label2id={"none": 0, "one": 1, "more": 2},
    )  # fmt: skip
    counter = Counter([*tiny.SPECIAL, *tiny.WORDS].index("cat"))
    path = labelled(tmp_path, [("the cat", "one"), ("a dog", "none"), ("cat cat", "one")], "text,verdict")
    given = subject(counter, path, "text-classification", tokenizer=folder)
    assert accuracy(given, Accuracy(label_column="verdict")) == pytest.approx(2 / 3)
    path = labelled(tmp_path, [("the cat", "maybe")])
    with pytest.raises(DataError, match="expected a class index, or one of more, none, one, got 'maybe'"):
        accuracy(given, Accuracy())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_accuracy_on_arrays_is_the_share_that_is_right(suffix: str, tmp_path: Path) -> None:
    program, x = tiny.captured_mlp(), tiny.mlp_inputs(40, seed=4)
    labels = program(x=x)["output"].argmax(-1)
    labels[:10] = (labels[:10] + 1) % 10
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, x=x.numpy(), labels=labels.numpy())
    else:
        save_file({"x": x, "labels": labels}, path)
    assert accuracy(subject(program, path, inputs=["x"], batch_size=7), Accuracy()) == 0.75
    assert accuracy(subject(program, path, inputs=["x"], samples=20), Accuracy()) == 0.5


def test_arrays_without_labels_are_an_error(data: Path) -> None:
    with pytest.raises(DataError, match=r"arrays\.npz: expected an array `labels`, got x"):
        accuracy(subject(tiny.captured_mlp(), data / "arrays.npz", inputs=["x"]), Accuracy())


# Spearman.


def test_spearman_is_that_of_scipy_on_the_embeddings_of_transformers(data: Path, bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    program = lrc.capture(str(bert))
    names = list(program.inputs.examples)
    found = spearman(
        subject(program, data / "pairs.csv", "sentence-similarity", tokenizer=bert, inputs=names), Spearman()
    )  # fmt: skip
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    rows = [line.split(",") for line in (data / "pairs.csv").read_text().splitlines()[1:]]
    cosines = []
    for first, second, _ in rows:
        with torch.no_grad():
            a, b = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in (first, second))
        cosines.append(float(torch.nn.functional.cosine_similarity(a.double(), b.double())))
    assert found == pytest.approx(float(spearmanr(cosines, [float(row[2]) for row in rows]).statistic), abs=1e-12)


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\na cat,a dog,much\n")
    given = subject(lrc.capture(str(bert)), tmp_path / "pairs.csv", "sentence-similarity", tokenizer=bert)
    with pytest.raises(DataError, match=r"pairs\.csv: expected numbers in the column `score`, got could not convert"):
        spearman(given, Spearman())


# Comparing with the original.


def test_a_model_continues_as_itself(data: Path, llama: Path) -> None:
    given = subject(Bigram(), data / "stream.txt", "text-generation", original=Bigram(), tokenizer=llama)
    assert generation(given, Generation(tokens=6, prompt=4, prompts=3)) == 1.0
    assert divergence(given, Divergence()) == 0.0


def test_generation_counts_the_tokens_before_the_first_difference(data: Path, llama: Path) -> None:
    """The other model differs after one token alone: a prompt that leads there after k tokens shares k of them."""
    prompt = ids_of(data / "stream.txt", 4)[0].tolist()
    follow = TABLE.argmax(-1).tolist()
    chain = [prompt[-1]]
    for _ in range(6):
        chain.append(follow[chain[-1]])
    other = TABLE.clone()
    where = chain[3]  # the fourth new token is chosen after it
    other[where, follow[where]] = other[where].min() - 1
    given = subject(Bigram(other), data / "stream.txt", "text-generation", original=Bigram(), tokenizer=llama)
    assert chain.index(where) == 3
    assert generation(given, Generation(tokens=6, prompt=4, prompts=1)) == 3 / 6


def test_the_divergence_is_the_one_computed_by_hand(data: Path, llama: Path) -> None:
    other = TABLE + 0.3 * torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p, q = TABLE.log_softmax(-1), other.log_softmax(-1)
    by_row = (p.exp() * (p - q)).sum(-1)
    wanted = float(by_row[ids_of(data / "stream.txt", 16)].mean())
    given = subject(
        Bigram(other), data / "stream.txt", "text-generation", original=Bigram(), tokenizer=llama, max_length=16
    )  # fmt: skip
    assert divergence(given, Divergence()) == pytest.approx(wanted, rel=1e-9)
    assert wanted > 0


@pytest.mark.parametrize(("rule", "options"), [(generation, Generation()), (divergence, Divergence())])
def test_a_comparison_needs_the_original(rule: Any, options: Any, data: Path, llama: Path) -> None:
    wanted = rf"evaluate\.{options.type}: there is no original model to compare with\. Name MODEL"
    with pytest.raises(UsageError, match=wanted):
        rule(subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama), options)


# A metric of the user's own.


def test_a_function_of_the_user_runs_only_when_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"my_metric_{random.Random(0).randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text("def answer(model):\n    return model(x=1)['y'] + 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = PythonMetric(function=f"{name}:answer")
    runner: Any = lambda x: {"y": x}  # noqa: E731
    with pytest.raises(UsageError, match=r"the metric runs code of yours\. Add `--allow-code` to let it run"):
        python_metric(subject(runner), options)
    assert name not in sys.modules
    assert python_metric(subject(runner, allow_code=True), options) == 1.5
    with pytest.raises(UsageError, match=f"{name}:nothing: module '{name}' has no attribute 'nothing'"):
        python_metric(subject(runner, allow_code=True), PythonMetric(function=f"{name}:nothing"))


# Beside the original.


def test_scores_stand_beside_those_of_the_original(data: Path, llama: Path) -> None:
    other = Bigram(TABLE / 2)
    spec = EvaluateSpec.model_validate({"metrics": ["perplexity", "generation", "kl"]})
    rows = evaluate(other, Bigram(), spec, request(data / "stream.txt", "text-generation", tokenizer=llama, max_length=16))
    by_name = {row.metric: row for row in rows}
    score = by_name["perplexity"]
    assert score.original is not None
    assert score.gain == pytest.approx(-(score.value - score.original) / score.original)  # higher is worse
    assert (by_name["generation"].value, by_name["generation"].original, by_name["generation"].gain) == (1.0, None, None)
    assert by_name["kl"].value > 0


def test_a_metric_without_data_says_where_to_name_it() -> None:
    with pytest.raises(UsageError, match=r"evaluate\.perplexity: no data\. Set `evaluate\.dataset`, or the metric's `dataset`"):
        perplexity(subject(Bigram()), Perplexity())


def test_a_metric_may_have_data_of_its_own(data: Path, llama: Path) -> None:
    whole = subject(Bigram(), data / "calib.txt", "text-generation", tokenizer=llama, max_length=16)
    own = perplexity(whole, Perplexity(dataset=str(data / "stream.txt")))
    assert own != perplexity(whole, Perplexity())
    other = subject(Bigram(), data / "stream.txt", "text-generation", tokenizer=llama, max_length=16)
    assert own == perplexity(other, Perplexity())
