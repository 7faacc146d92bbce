"""Objectives on their own: which tokens are hidden, and what cannot be learned from."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lrc.errors import DataError, UsageError
from lrc.train.objectives import Step
from lrc.train.objectives.language import CausalLm, MaskedLm, causal_lm, masked_lm

MASK, SPECIAL, WORDS = 3, (0, 1, 2, 3), 500


class Student:
    """Remembers what it was asked; says that every token is its own place in the vocabulary."""

    asked: Tensor

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.asked = batch["input_ids"]
        return {"logits": 20 * torch.nn.functional.one_hot(self.asked, WORDS).float()}


def texts(rows: int = 80, length: int = 60) -> dict[str, Tensor]:
    """Return texts between two special tokens, the last fifth of every one padding."""
    ids = torch.randint(10, WORDS, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, length - length // 5 - 1], ids[:, length - length // 5 :] = 1, 2, 0
    mask = torch.ones_like(ids)
    mask[:, length - length // 5 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step(batch: Mapping[str, Tensor], student: Student, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    return Step(dict(batch), student, generator=generator, mask_id=MASK, vocabulary=WORDS, special=SPECIAL)


def test_words_are_hidden_in_the_shares_of_bert_and_special_tokens_never() -> None:
    batch, student = texts(), Student()
    masked_lm(step(batch, student), MaskedLm(share=0.3))
    ids, asked = batch["input_ids"], student.asked
    words = (ids >= 10) & (batch["attention_mask"] > 0)
    assert torch.equal(asked[~words], ids[~words])
    count = int(words.sum())
    hidden, other = int((asked == MASK).sum()), int(((asked != ids) & (asked != MASK)).sum())
    assert hidden / count == pytest.approx(0.3 * 0.8, abs=0.02)
    assert other / count == pytest.approx(0.3 * 0.1, abs=0.01)


def test_the_loss_is_that_of_the_chosen_tokens_alone() -> None:
    """The student repeats what it sees: it is right on those that are left, and wrong on those that are hidden or replaced."""
    student = Student()
    loss = masked_lm(step(texts(), student), MaskedLm(share=0.3))
    assert float(loss) == pytest.approx(20 * 0.9, abs=0.6)


def test_where_chance_chooses_nothing_the_first_word_is_chosen() -> None:
    batch, student = texts(2, 10), Student()
    loss = masked_lm(step(batch, student), MaskedLm(share=1e-9))
    assert torch.isfinite(loss)
    changed = (student.asked != batch["input_ids"]).nonzero().tolist()
    assert changed in ([], [[0, 1]])


def test_a_batch_without_words_and_a_tokenizer_without_a_mask_are_refused() -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with pytest.raises(DataError, match="special tokens and padding alone"):
        masked_lm(step(batch, Student()), MaskedLm())
    with pytest.raises(UsageError, match="a tokenizer with a mask token"):
        masked_lm(Step(batch, Student()), MaskedLm())


def test_padded_and_left_out_tokens_are_not_predicted() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.clone()}
    batch["labels"][1, 2:] = -100
    loss = causal_lm(step(batch, Student()), CausalLm())
    logits = 20 * torch.nn.functional.one_hot(ids, WORDS).float()
    expected = torch.nn.functional.cross_entropy(
        torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]]), torch.tensor([6, 7, 6])
    )
    assert float(loss) == pytest.approx(float(expected))
