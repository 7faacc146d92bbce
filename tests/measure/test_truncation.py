"""Training where truncation stands: on models whose best share of the budget is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.data import Batches, batches_of
from lrc.measure import Cache, collect
from lrc.measure.truncation import SAVED, Learned, Problem, Training, Truncated, from_model, learn
from lrc.program import Program
from lrc.ranks import LearnedAllocation, SiteCurve
from lrc.ranks.candidates import Budget, Candidates, total_cost
from lrc.ranks.learned import Course
from lrc.solvers import Decomposition, dobi, kfac, svd
from lrc.spec.registry import Rule

WIDTH = 12


class Parallel(nn.Module):
    """Two linears of one input with equal spectra; the output is that of `heard`, and a whisper of `mute`."""

    def __init__(self, whisper: float = 1e-3) -> None:
        super().__init__()
        self.heard = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mute = nn.Linear(WIDTH, WIDTH, bias=False)
        self.whisper = whisper

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.heard(x), self.whisper * self.mute(x)], -1)


@pytest.fixture(scope="module")
def parallel() -> Program:
    torch.manual_seed(0)
    return lrc.capture(Parallel().eval(), {"x": torch.randn(4, WIDTH)})


@pytest.fixture(scope="module")
def data() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return batches_of([{"x": torch.randn(64, WIDTH, generator=generator)} for _ in range(6)], ["x"])


def terms_of(program: Program, rule: Rule[..., Decomposition] = svd, data: Batches | None = None) -> dict[str, Decomposition]:
    options = rule.options()
    moments = collect(program, data or batches_of([program.inputs.examples], ["x"]), program.sites, options.needs)  # type: ignore[attr-defined]
    made = {}
    for fqn, site in program.sites.items():
        weight, bias = site.map.dense()
        made[fqn] = rule(weight, bias, moments[fqn], min(site.shape), options, torch.Generator())
    return made


def menus(program: Program, terms: dict[str, Decomposition]) -> list[Candidates]:
    return [
        SiteCurve(fqn, *program.sites[fqn].shape, found.losses(), found.S, form="pivoted").candidates("numbers")
        for fqn, found in terms.items()
    ]


def problem(program: Program, data: Batches, kept: float = 0.6, **options: object) -> Problem:
    terms = terms_of(program)
    sites = menus(program, terms)
    amount = kept * sum(float(site.costs[-1]) for site in sites)
    start = [site.within(kept) for site in sites]
    how = LearnedAllocation.model_validate({"steps": 40, "learning_rate": 0.1, "smoothing": 0.05, **options})
    return Problem(program, terms, sites, Budget(amount, kept), start, data, how, key="k")


def ranks(asked: Problem, found: Learned) -> list[int]:
    return [
        site.ranks[i] if i < len(site.ranks) else WIDTH for site, i in zip(asked.sites, found.places, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [svd, dobi, kfac], ids=["svd", "dobi", "kfac"])
def test_a_mask_of_ones_leaves_the_outputs_as_they_are(rule: Rule[..., Decomposition], data: Batches) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, 9)).eval()
    program = lrc.capture(model, (torch.randn(4, WIDTH),))
    given = batches_of([batch["x"] for batch in data], list(program.inputs.examples))
    terms = terms_of(program, rule, given)
    batch = next(iter(given))
    with torch.no_grad():
        wanted = next(iter(program(**batch).values()))
        truncated = Truncated(program, terms)
        found = next(iter(truncated({fqn: torch.ones(len(t.S)) for fqn, t in terms.items()}, batch).values()))
    assert float((found - wanted).abs().max()) <= 64 * WIDTH * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_a_mask_of_ones_and_zeros_is_the_truncation_that_is_put_in_place(data: Batches) -> None:
    """With `kfac`, whose bias carries the mean of what is dropped."""
    torch.manual_seed(0)
    program = lrc.capture(nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, 9)).eval(), (torch.randn(4, WIDTH),))
    given = batches_of([batch["x"] + 1 for batch in data], list(program.inputs.examples))
    terms = terms_of(program, kfac, given)
    assert all(found.mean is not None for found in terms.values())
    made = program.clone()
    for fqn, found in terms.items():
        made.replace(fqn, made.sites[fqn].layout.product(*found.truncate(4, torch.float32)))
    batch = next(iter(given))
    with torch.no_grad():
        wanted = next(iter(made(**batch).values()))
        masks = {fqn: (torch.arange(len(t.S)) < 4).float() for fqn, t in terms.items()}
        found = next(iter(Truncated(program, terms)(masks, batch).values()))
    assert float((found - wanted).abs().max()) <= 64 * WIDTH * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_the_budget_goes_to_the_layer_that_the_loss_looks_at(parallel: Program, data: Batches) -> None:
    asked = problem(parallel, data)
    found = learn(asked)
    heard, mute = ranks(asked, found)
    assert total_cost(asked.sites, found.places) <= asked.budget.amount
    assert heard > mute + 3
    assert found.after < 0.5 * found.before


def test_the_gradient_of_the_loss_by_a_position_is_its_difference_quotient(data: Batches) -> None:
    torch.manual_seed(0)
    asked = problem(lrc.capture(Parallel(whisper=1.0).eval(), {"x": torch.randn(4, WIDTH)}), data)
    courses = [Course.of(site, WIDTH) for site in asked.sites]
    run = Training(asked, courses, None)
    batch = next(iter(data))
    position = torch.tensor([6.3, 4.1], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(run._loss(position, batch), position)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-2
        with torch.no_grad():
            quotient = float(run._loss(position + step, batch) - run._loss(position - step, batch)) / 2e-2
        assert float(found[i]) == pytest.approx(quotient, rel=2e-2, abs=1e-4)


def test_where_nothing_is_gained_the_start_is_kept(parallel: Program, data: Batches) -> None:
    asked = problem(parallel, data, steps=1, learning_rate=1e-6)
    found = learn(asked)
    assert list(found.places) == list(asked.start)
    assert found.after == found.before


def test_the_same_seed_learns_the_same_and_no_tensor_of_the_program_changes(parallel: Program, data: Batches) -> None:
    before = parallel.digest()
    first, second = (learn(problem(parallel, data, steps=6)) for _ in range(2))
    assert first == second
    assert parallel.digest() == before


def test_a_killed_run_goes_on_where_it_stopped(parallel: Program, data: Batches, tmp_path: Path) -> None:
    asked = problem(parallel, data, steps=SAVED + 4)
    whole = learn(asked)

    class KilledError(Exception):
        """What stops a run."""

    def kill(step: int, total: int) -> None:
        seen.append(step)
        if step == SAVED + 2:
            raise KilledError

    seen: list[int] = []
    with pytest.raises(KilledError):
        learn(asked, Cache(tmp_path), kill)
    seen = []
    assert learn(asked, Cache(tmp_path), lambda step, total: seen.append(step)) == whole
    assert seen[0] == SAVED


@pytest.mark.parametrize("classes", [True, False])
def test_the_distance_from_the_model_is_zero_at_the_model_and_ignores_padding(classes: bool) -> None:
    wanted = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    found = wanted.clone()
    found[1, 1:] += 9
    assert float(from_model(found, wanted, weights, classes=classes)) == pytest.approx(0, abs=1e-6)
    found[0, 0] = 0
    assert float(from_model(found, wanted, weights, classes=classes)) > 1e-3
