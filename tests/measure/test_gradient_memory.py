"""Gradients of weights are estimated layer by layer: what is held at a time is about one weight's gradient."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lrc_passes.adapt_sources import Gradients
from torch import nn

import lrc
from lrc.data import Batch, Batches
from lrc.measure import Cache
from lrc.measure.gradients import in_memory
from lrc.program import Program
from lrc.run import Session

WIDTH, LAYERS = 256, 8
ONE = 4 * WIDTH * WIDTH  # bytes of one weight's gradient


def deep() -> tuple[Program, list[Batch]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))).eval()
    batches: list[Batch] = [{"input": torch.randn(2, WIDTH)} for _ in range(3)]
    return lrc.capture(model, batches[0]), batches


def peak(call: Callable[[], object]) -> int:
    """The most bytes of tensors that lived at once, beyond those that lived before, as torch's own allocator tells."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def all_of(program: Program, batches: list[Batch], most: int, folder: Path) -> float:
    """Run through every site's gradient, as `adapt` does, keeping a number of each."""
    session = Session(cache=Cache(folder), batches=lambda: Batches(batches))
    gradients = Gradients(program, session, list(program.sites), most)
    return sum(float(gradients(fqn).norm()) for fqn in program.sites)


def test_about_one_weight_s_gradient_is_held_at_a_time(tmp_path: Path) -> None:
    program, batches = deep()
    streamed = peak(lambda: all_of(program, batches, 0, tmp_path))
    together = peak(lambda: all_of(program, batches, LAYERS * ONE, tmp_path))
    assert streamed < 2.5 * ONE  # the sum, and what one batch adds to it
    assert together > LAYERS * ONE
    assert all_of(program, batches, 0, tmp_path) == pytest.approx(all_of(program, batches, LAYERS * ONE, tmp_path), rel=1e-5)


def test_no_site_is_measured_twice_and_none_left_out() -> None:
    program, _ = deep()
    for most in (0, 3 * ONE, 100 * ONE):
        groups = list(in_memory(program, list(program.sites), most))
        assert [fqn for group in groups for fqn in group] == list(program.sites)
        assert max(len(group) for group in groups) * ONE <= max(most, ONE)
