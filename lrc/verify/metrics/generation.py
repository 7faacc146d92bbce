"""How long a compressed language model goes on saying what the original one says."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.data import load_windows
from lrc.errors import UsageError
from lrc.lower.base import Generator, Runner
from lrc.verify.metrics.base import MetricOptions, Subject, metric, readouts
from lrc.verify.runner import run


class Generation(MetricOptions):
    """Share of leading greedy tokens that are those of the original model, after prompts out of the data."""

    type: Literal["generation"] = "generation"
    tokens: int = Field(default=24, ge=1, description="Tokens that are generated after a prompt.")
    prompt: int = Field(default=16, ge=1, description="Tokens of a prompt.")
    prompts: int = Field(default=8, ge=1, description="How many prompts.")
    relative: ClassVar[bool] = True


class Divergence(MetricOptions):
    """Mean Kullback-Leibler divergence of the next token's distribution from that of the original model, in nats."""

    type: Literal["kl"] = "kl"
    higher_is_better: ClassVar[bool] = False
    relative: ClassVar[bool] = True


@metric(Generation)
def generation(subject: Subject, options: Generation) -> float:
    """Return the mean share, 0 … 1, of the `tokens` greedy tokens before the first one that differs."""
    original = need_original(subject, options)
    request = subject.data(options)
    short = replace(request, max_length=options.prompt, samples=options.prompts)
    shares = []
    for batch in load_windows(short):
        theirs = greedy(original, batch["input_ids"], options.tokens)
        ours = greedy(subject.runner, batch["input_ids"], options.tokens)
        equal = (ours == theirs).cumprod(-1)
        shares.append(equal.double().mean(-1))
    return float(torch.cat(shares).mean())


@metric(Divergence)
def divergence(subject: Subject, options: Divergence) -> float:
    """Return the mean over all positions of sum p log(p / q), p the original model's distribution, q the compressed one's."""
    original = need_original(subject, options)
    batches = load_windows(subject.data(options))
    total, count = 0.0, 0
    pairs = zip(
        readouts(original, batches, "text-generation"),
        readouts(subject.runner, batches, "text-generation"),
        strict=True,
    )
    for theirs, ours in pairs:
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += p[..., 0].numel()
    return total / max(count, 1)


def need_original(subject: Subject, options: MetricOptions) -> Runner:
    """Return the original model. Raises UsageError when there is none to compare with."""
    if subject.original is None:
        raise UsageError(f"evaluate.{options.type}", message="there is no original model to compare with", hint="Name MODEL")
    return subject.original


def greedy(runner: Runner, prompt: Tensor, tokens: int) -> Tensor:
    """Return the greedy continuation of (batch, length) ids, (batch, tokens).

    A runner with a cache makes it by itself, as it is served; any other runs the whole text again for each token.
    """
    if isinstance(runner, Generator):
        return torch.as_tensor(runner.generate(prompt, max_new_tokens=tokens))[:, prompt.shape[1] :]
    ids = prompt
    for _ in range(tokens):
        logits = run(runner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
        ids = torch.cat([ids, logits[:, -1].float().argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :]
